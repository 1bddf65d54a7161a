"""Is it safer? The verdict on what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from ..behaviour.verdict import Verdict, judge_guard
from .behaviour import GUARDED, ORIGINAL
from .piece import JSON, Context, Piece, Stage


def _run(context: Context) -> Verdict | None:
    original, guarded = context.found.of(ORIGINAL), context.found.of(GUARDED)
    return judge_guard(original, guarded) if original and guarded else None


def _reasons(figures: JSON) -> Iterator[str]:
    if reasons := (figures.get("verdict") or {}).get("reasons", []):
        yield "\n".join(f"- {reason}" for reason in reasons)


VERDICT = Piece("verdict", _run, Stage.RESULTS, card_head=_reasons)
"""Without failures: what is not safer may be published as such, where that is asked for."""
