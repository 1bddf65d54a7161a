"""What the evidence is asked about each artefact of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..export.checkpoint.rounding import Rounding
from ..export.formats.base import Held
from ..export.formats.onnx.graphs import WrittenGraphs
from ..export.model import OpenModel
from ..validators.behaviour.evaluation_prompts import EvaluationPrompts
from ..validators.behaviour.judge import Judge
from ..validators.behaviour.verdict import LIMITS, Limits
from ..validators.evidence.evidence import Evidence, examine, examine_hooked, with_graphs
from ..validators.evidence.runtime import check_graphs
from .writing import Artefact


@dataclass(frozen=True)
class Examiner:
    """What all artefacts of a run are examined with.

    model, held: what is guarded, and what is held of the guard.  rounding: how weights were rounded.  probes: None
    where behaviour is not measured.  judge: None for phrases.  limits: of the verdict.  original: the folder whose
    model gets the hooks that graphs are compared with; None where it is not at hand.
    """

    model: OpenModel
    held: Held
    rounding: Rounding
    probes: EvaluationPrompts | None = None
    judge: Judge | None = None
    limits: Limits = LIMITS
    original: Path | None = None

    def of_hooks(self) -> Evidence:
        """Gathers the evidence about the model with the guard's hooks, which nothing holds yet."""
        return examine_hooked(self.model.checkpoint, self.held.guard, self.probes, self.judge, self.limits)

    def of(self, opened: Any, evidence: Evidence | None = None) -> Evidence:
        """Gathers the evidence about what a format opened: weights, or what reads like them; or graphs, whose evidence
        is added to `evidence`, about what they were made of. InputError if it cannot be loaded or run.
        """
        model, held = self.model, self.held
        if not isinstance(opened, WrittenGraphs):
            family, measured = model.family, (self.probes, self.judge, self.limits)
            return examine(model.checkpoint, opened, family, held.guard, held.fold, self.rounding, *measured)
        assert evidence, "graphs come after what they are made of"
        folder, provider = opened.folder, opened.provider
        runtime = check_graphs(folder, opened.plan, opened.weights, self.original, held.guard, provider)
        return with_graphs(evidence, runtime, folder, provider, self.probes, self.judge)


def vouched(artefacts: Iterable[Artefact], evidence: Evidence) -> bool:
    """Tells whether nothing was written that nobody looked at, and graphs do what torch does or were shown to
    be safer.
    """
    seen = all(artefact.opened is not None for artefact in artefacts)
    return seen and (evidence.runtime is None or evidence.runtime.vouched)
