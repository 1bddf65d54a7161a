"""All the evidence about one guarded folder: what the pieces found, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...export.checkpoint.headers import Checkpoint
from ...export.checkpoint.rounding import Rounding
from ...export.families.table import Family
from ...export.fold import Fold
from ...export.formats.lora import Adapted
from ...guard.guard import Guard
from ..behaviour.evaluation_prompts import EvaluationPrompts
from ..behaviour.judge import Judge
from ..behaviour.verdict import LIMITS, Limits, Ruling, Verdict
from . import EVIDENCE
from .conclusion import VERDICT
from .graphs import RUNTIME
from .integrity import INTEGRITY, Integrity
from .piece import Context, Edited, Found, Graphs
from .runtime import Runtime

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Evidence:
    """What was found of what `context` says; nothing more is looked for once something fails.

    What a piece found is an attribute by the piece's name, for example `integrity`, `equivalence`, `original`,
    `guarded`, `verdict`, `runtime`: None where it was not run.
    """

    context: Context

    @property
    def found(self) -> Found:
        return self.context.found

    def __getattr__(self, name: str) -> Any:
        if name not in EVIDENCE:
            raise AttributeError(name)
        return self.context.found.get(name)

    @property
    def sound(self) -> bool:
        """Whether the folder is whole and equal to its hooks, whatever it does."""
        return not self.failures and any(piece.equality and piece.name in self.found for piece in EVIDENCE.values())

    @property
    def failures(self) -> tuple[str, ...]:
        """What is wrong with the folder, whatever it does."""
        return tuple(failure for piece in EVIDENCE.values() for failure in piece.fails(self.found))

    @property
    def ruling(self) -> str:
        verdict = self.found.of(VERDICT)
        return verdict.ruling if verdict else NOT_MEASURED

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the ruling is what it is; for an unsound folder, what is wrong with it."""
        verdict = self.found.of(VERDICT)
        return self.failures or (verdict.reasons if verdict else ())

    def figures(self) -> dict[str, Any]:
        """Returns everything measured, as JSON."""
        told = {name: piece.told(self.found) for name, piece in EVIDENCE.items() if piece.run}
        return {"ruling": self.ruling, **told}


def gather(context: Context) -> Evidence:
    """Runs, stage by stage, every piece that has found nothing yet, up to the first that fails."""
    found = Found(context.found)
    for piece in sorted(EVIDENCE.values(), key=lambda piece: piece.stage):
        if piece.run and piece.name not in found:
            value = piece.run(replace(context, found=found))
            if value is not None:
                found[piece.name] = value
            if piece.fails(found):
                break
    context.opened.close()
    return Evidence(replace(context, found=found))


def examine(
    source: Checkpoint,
    folded: Checkpoint | Adapted,
    family: Family,
    guard: Guard,
    fold: Fold,
    rounding: Rounding,
    probes: EvaluationPrompts | None,
    judge: Judge | None = None,
    limits: Limits = LIMITS,
) -> Evidence:
    """Gathers the evidence about `folded`, made from `source` by folding `guard`. Without `probes`, behaviour is not
    measured.

    rounding: how the weights were rounded.  judge: default, by phrases.  limits: of the verdict.  Raises InputError if
    either folder cannot be loaded.
    """
    return gather(Context(source, guard, Edited(folded, family, fold, rounding), probes, judge, limits=limits))


def examine_hooked(
    source: Checkpoint,
    guard: Guard,
    probes: EvaluationPrompts | None,
    judge: Judge | None = None,
    limits: Limits = LIMITS,
) -> Evidence:
    """Gathers the evidence about `source` with `guard`'s hooks, which graphs shall hold: what it does. Nothing was
    folded.
    """
    return gather(Context(source, guard, None, probes, judge, limits=limits))


def with_graphs(
    evidence: Evidence,
    runtime: Runtime,
    folder: Path,
    provider: str,
    probes: EvaluationPrompts | None,
    judge: Judge | None = None,
) -> Evidence:
    """Adds to `evidence` what `runtime` and the graphs in `folder` say. Formats too coarse to be equal to torch are
    asked `probes`, on `provider`, and fail unless they are safer than the original.
    """
    return gather(replace(evidence.context, probes=probes, judge=judge, graphs=Graphs(runtime, folder, provider)))


def inherited(checkpoint: Checkpoint, guard: Guard, ruling: Ruling, runtime: Runtime | None) -> Evidence:
    """Returns the evidence about graphs of a guarded `checkpoint`, whose files are those that its `ruling` was found
    on.
    """
    found = Found(
        {
            INTEGRITY.name: Integrity(len(checkpoint.tensors), 0, (), "hashes in the manifest", ()),
            VERDICT.name: Verdict(ruling, ("measured when it was guarded",), {}),
        }
    )
    if runtime:
        found[RUNTIME.name] = runtime
    return Evidence(Context(checkpoint, guard, found=found))
