"""What did the original do, prompt by prompt? Kept so that what is served later can be paired with it (recorded.py)."""

from __future__ import annotations

from typing import Any

from ..behaviour.recorded import asked, record
from .behaviour import ORIGINAL
from .piece import Context, Piece, Stage


def _run(context: Context) -> dict[str, Any] | None:
    probes, original = context.probes, context.found.of(ORIGINAL)
    if probes is None or original is None:
        return None
    return {"probes": asked(probes), "judge": context.rules(probes).name, "original": record(original)}


OUTCOMES = Piece("outcomes", _run, Stage.RESULTS, figures=dict)
