"""How a run ends: an export, or a refusal with its evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..guard.base.errors import Refused
from ..guard.guard import Guard
from ..validators.evidence.evidence import Evidence


@dataclass(frozen=True)
class Export:
    """A finished export: where it lies, its guard, the evidence about it, and whether that shows it to be safer."""

    folder: Path
    guard: Guard
    evidence: Evidence
    verified: bool
    url: str | None = None
    """Of the commit or pull request, where it was pushed."""


class NotSafer(Refused):
    """Nothing was published: the evidence says why."""

    def __init__(self, evidence: Evidence) -> None:
        first, *others = evidence.reasons
        more = f" (and {len(others)} more reasons)" if others else ""
        if evidence.sound:
            super().__init__(f"{evidence.ruling}: {first}{more}; nothing was written (--allow-weaker overrides)")
        else:
            super().__init__(f"not sound: {first}{more}; nothing was written")
        self.evidence = evidence


def refuse_unsound(evidence: Evidence, whatever_it_does: bool) -> None:
    """Raises NotSafer for what is not equal to its hooks, and, unless `whatever_it_does`, for what is not safer."""
    if not evidence.sound or not (evidence.ruling == "safer" or whatever_it_does):
        raise NotSafer(evidence)
