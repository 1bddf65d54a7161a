"""Every family that writers.md names, as tiny random models."""

from __future__ import annotations

from specimens import Specimen
from specimens.bridges import BRIDGES
from specimens.gemma_kind import GEMMA_KIND
from specimens.grid_kind import GRID_KIND
from specimens.llava_kind import LLAVA_KIND
from specimens.mixture import MIXTURE
from specimens.oddities import ODDITIES
from specimens.tile_kind import TILE_KIND

KNOWN: list[Specimen] = [*LLAVA_KIND, *GRID_KIND, *GEMMA_KIND, *TILE_KIND, *MIXTURE, *BRIDGES, *ODDITIES]
UNBUILDABLE: dict[str, str] = {}
