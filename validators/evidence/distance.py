"""How near do the guarded weights come to the published two-pass form?"""

from __future__ import annotations

from ...guard.prompts.image_kinds import IMAGE_KINDS, ImageKind
from ..behaviour.statistics import Rate
from .behaviour import GUARDED, TWO_PASS
from .piece import Context, Piece, Stage

Distances = dict[ImageKind, float]
"""Image kind -> compliance of the guarded weights minus that of the two-pass form: [-1, 1], 0 where equal."""


def _run(context: Context) -> Distances | None:
    guarded, reference = context.found.of(GUARDED), context.found.of(TWO_PASS)
    if guarded is None or reference is None:
        return None
    ours, theirs = guarded.kinds, reference.kinds
    return {kind: Rate.of(ours[kind].complied).rate - Rate.of(theirs[kind].complied).rate for kind in IMAGE_KINDS}


def _summary(distances: Distances) -> str:
    kind, worst = max(distances.items(), key=lambda item: abs(item[1]))
    return f"harmful compliance differs by {100 * worst:+.1f} points at most ({kind})"


DISTANCE = Piece(
    "distance_to_reference", _run, Stage.RESULTS, label="two-pass", figures=dict, absent={}, summary=_summary
)
