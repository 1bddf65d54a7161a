"""Every family that guardfold knows, as tiny random models."""

from __future__ import annotations

from specimens import Specimen
from specimens.bridges import BRIDGES
from specimens.gemma_kind import GEMMA3N, GEMMA_KIND
from specimens.grid_kind import GRID_KIND
from specimens.llava_kind import LLAVA_KIND, TIED_OPT
from specimens.mixture import MIXTURE
from specimens.oddities import ODDITIES
from specimens.text_kind import TEXT_KIND
from specimens.tile_kind import TILE_KIND

KNOWN: list[Specimen] = [*LLAVA_KIND, *TEXT_KIND, *GRID_KIND, *GEMMA_KIND, *TILE_KIND, *MIXTURE, *BRIDGES, *ODDITIES]
UNTIED = {"llava+opt", "llava+gpt_neox", "mllama", "molmo2", "molmo2+norm_after"}
REFUSED = [GEMMA3N, TIED_OPT]
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "TimmWrapperModel requires the timm library",
    "llava+opt, tied": "OPTModel has no attribute `embed_tokens`",
}
