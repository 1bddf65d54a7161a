"""Is it safer? The verdict on what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from ..behaviour.verdict import Verdict, judge_guard
from .behaviour import GUARDED, ORIGINAL
from .coherence import COHERENCE
from .effects import EFFECTS
from .piece import JSON, Context, Piece, Stage


def _run(context: Context) -> Verdict | None:
    original, guarded = context.found.of(ORIGINAL), context.found.of(GUARDED)
    if not original or not guarded:
        return None
    effects, coherence = context.found.of(EFFECTS), context.found.of(COHERENCE)
    kl = effects.kl if effects else None
    incoherent = coherence.incoherent if coherence else None
    return judge_guard(original, guarded, context.limits, kl, incoherent)


def _reasons(figures: JSON) -> Iterator[str]:
    if reasons := (figures.get("verdict") or {}).get("reasons", []):
        yield "\n".join(f"- {reason}" for reason in reasons)


VERDICT = Piece("verdict", _run, Stage.RESULTS, card_head=_reasons)
"""Without failures: what is not safer may be published as such, where that is asked for."""
