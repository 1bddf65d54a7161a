"""Evidence about what was written: is it whole, equal to its hooks, safer? A piece is a file, and a line below.

The order is that of reports; what is run follows the order of Stage. EVIDENCE may be added to, before anything is
examined. See CONTRIBUTING.md, "A new piece of evidence".
"""

from __future__ import annotations

from typing import Any

from .behaviour import GUARDED, ORIGINAL, TWO_PASS
from .coherence import COHERENCE
from .conclusion import VERDICT
from .detector import DETECTOR
from .distance import DISTANCE
from .effects import EFFECTS
from .equivalence import EQUIVALENCE
from .graphs import RUNTIME
from .integrity import INTEGRITY
from .outcomes import OUTCOMES
from .piece import Piece
from .provenance import PROVENANCE
from .samples import SIDE_BY_SIDE

EVIDENCE: dict[str, Piece[Any]] = {
    piece.name: piece
    for piece in (
        INTEGRITY,
        EQUIVALENCE,
        RUNTIME,
        ORIGINAL,
        GUARDED,
        TWO_PASS,
        EFFECTS,
        COHERENCE,
        DETECTOR,
        PROVENANCE,
        VERDICT,
        DISTANCE,
        SIDE_BY_SIDE,
        OUTCOMES,
    )
}
