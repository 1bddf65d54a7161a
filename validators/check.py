"""All the evidence about one guarded folder: integrity, equivalence with leaks, behaviour, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..export.checkpoint import Checkpoint
from ..export.fold import Fold
from ..export.writers import Family
from ..guard.guard import Guard
from ..guard.vlm import load
from .behaviour import Behaviour, measure
from .equivalence import Equivalence, compare
from .integrity import Integrity, inspect_folder
from .judge import PhraseJudge
from .probes import Probes
from .verdict import Verdict, judge_guard

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Evidence:
    """What was found, in the order in which it was looked for; a later part is None where an earlier one failed."""

    integrity: Integrity
    equivalence: Equivalence | None
    original: Behaviour | None = None
    guarded: Behaviour | None = None
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
        parts = {
            "integrity": self.integrity,
            "equivalence": self.equivalence,
            "original": self.original,
            "guarded": self.guarded,
            "verdict": self.verdict,
        }
        return {"ruling": self.ruling} | {name: part.figures() if part else None for name, part in parts.items()}


def examine(
    source: Checkpoint, folded: Checkpoint, family: Family, guard: Guard, fold: Fold, probes: Probes | None
) -> Evidence:
    """The evidence about `folded`, made from `source` by folding `guard`. Without `probes`, behaviour is not measured.

    Raises InputError if either folder cannot be loaded.
    """
    integrity = inspect_folder(source, folded, family, fold)
    if not integrity.passed:
        return Evidence(integrity, None)
    equivalence = compare(source, folded, guard, fold)
    if probes is None or not equivalence.passed:
        return Evidence(integrity, equivalence)
    judge = PhraseJudge(probes.refusal)
    original = measure(load(source.folder), probes, judge, "original")
    guarded = measure(load(folded.folder), probes, judge, "guarded")
    return Evidence(integrity, equivalence, original, guarded, judge_guard(original, guarded))
