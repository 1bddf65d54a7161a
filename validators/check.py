"""All the evidence about one guarded folder: integrity, equivalence with leaks, behaviour, verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..export.checkpoint import Checkpoint
from ..export.fold import Fold
from ..export.writers import Family
from ..guard.directions import auc
from ..guard.guard import Guard
from ..guard.hooks import attached
from ..guard.images import IMAGE_KINDS, ImageKind
from ..guard.interventions import Gate
from ..guard.transcripts import answer, last_readings
from ..guard.vlm import VLM, load
from .behaviour import Behaviour, measure
from .divergence import Divergence
from .equivalence import Equivalence, compare
from .integrity import Integrity, inspect_folder
from .judge import Judge, PhraseJudge
from .probes import Probes
from .verdict import Verdict, judge_guard

NOT_MEASURED = "not measured"


KL_PROMPTS = 48
"""Benign probes whose answers' distributions are compared, under each image kind."""


@dataclass(frozen=True)
class Effects:
    """What the guard does inside, by image kind. kl: mean KL(original || with hooks) per token of benign answers, nats.
    auc: how well its detector tells harmful probes from benign ones (empty without a gate).
    """

    kl: dict[ImageKind, float]
    auc: dict[ImageKind, float]

    def figures(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What was found, in the order in which it was looked for; a later part is None where an earlier one failed.

    reference: the published two-pass form of the same directions, as hooks on the original.
    """

    integrity: Integrity
    equivalence: Equivalence | None
    original: Behaviour | None = None
    guarded: Behaviour | None = None
    reference: Behaviour | None = None
    effects: Effects | None = None
    verdict: Verdict | None = None

    @property
    def sound(self) -> bool:
        """Whether the folder is whole and equal to its hooks, whatever it does."""
        return self.integrity.passed and self.equivalence is not None and self.equivalence.passed

    @property
    def ruling(self) -> str:
        return self.verdict.ruling if self.verdict else NOT_MEASURED

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the ruling is what it is; for an unsound folder, what is wrong with it."""
        unsound = self.integrity.failures + (self.equivalence.failures if self.equivalence else ())
        return unsound or (self.verdict.reasons if self.verdict else ())

    def figures(self) -> dict[str, Any]:
        """Everything measured, as JSON."""
        parts = ("integrity", "equivalence", "original", "guarded", "reference", "effects", "verdict")
        found = {name: getattr(self, name) for name in parts}
        return {"ruling": self.ruling} | {name: part.figures() if part else None for name, part in found.items()}


def examine(
    source: Checkpoint,
    folded: Checkpoint,
    family: Family,
    guard: Guard,
    fold: Fold,
    probes: Probes | None,
    judge: Judge | None = None,
) -> Evidence:
    """The evidence about `folded`, made from `source` by folding `guard`. Without `probes`, behaviour is not measured.

    judge: default, by phrases.  Raises InputError if either folder cannot be loaded.
    """
    integrity = inspect_folder(source, folded, family, fold)
    if not integrity.passed:
        return Evidence(integrity, None)
    equivalence = compare(source, folded, guard, fold)
    if probes is None or not equivalence.passed:
        return Evidence(integrity, equivalence)
    judge = judge or PhraseJudge(probes.refusal)
    vlm = load(source.folder)
    original = measure(vlm, probes, judge, "original")
    reference = measure(vlm, probes, judge, "two-pass", Guard((guard.reference,))) if guard.reference else None
    effects = _effects(vlm, guard, probes)
    del vlm  # one model at a time
    guarded = measure(load(folded.folder), probes, judge, "guarded")
    verdict = judge_guard(original, guarded)
    return Evidence(integrity, equivalence, original, guarded, reference, effects, verdict)


def _effects(vlm: VLM, guard: Guard, probes: Probes) -> Effects:
    kl: dict[ImageKind, float] = {}
    scores: dict[ImageKind, float] = {}
    gate = next((each for each in guard.interventions if isinstance(each, Gate)), None)
    for kind in IMAGE_KINDS:
        divergence = Divergence(vlm, answer(vlm, probes.benign[:KL_PROMPTS], f"answers, {kind}", kind), "reading")
        with attached(vlm.model, guard):
            kl[kind] = divergence.of(vlm.model)
        if gate:
            harmful, benign = (
                last_readings(vlm, prompts, kind, gate.layer, f"detector, {kind}") @ gate.detector
                for prompts in (probes.harmful, probes.benign)
            )
            scores[kind] = auc(harmful, benign)
    return Effects(kl, scores)
