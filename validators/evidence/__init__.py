"""Evidence about what was written: is it whole, equal to its hooks, safer? A piece is a file, and a line below.

The order is that of reports; what is run follows the order of Stage. EVIDENCE may be added to, before anything is
examined. See CONTRIBUTING.md, "A new piece of evidence".
"""

from __future__ import annotations

from typing import Any

from .behaviour import GUARDED, ORIGINAL, REFERENCE
from .conclusion import VERDICT
from .detector import DETECTOR
from .effects import EFFECTS
from .equivalence import EQUIVALENCE
from .graphs import RUNTIME
from .integrity import INTEGRITY
from .outcomes import OUTCOMES
from .piece import Piece
from .provenance import PROVENANCE
from .samples import SAMPLES
from .two_pass import TWO_PASS

EVIDENCE: dict[str, Piece[Any]] = {
    piece.name: piece
    for piece in (
        INTEGRITY,
        EQUIVALENCE,
        RUNTIME,
        ORIGINAL,
        GUARDED,
        REFERENCE,
        EFFECTS,
        DETECTOR,
        PROVENANCE,
        VERDICT,
        TWO_PASS,
        SAMPLES,
        OUTCOMES,
    )
}
