"""Is every edited tensor in the file what the fold says, to the last place its dtype has? Entry by entry."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...export.checkpoint.edits import Folded, row_blocks
from ...export.checkpoint.headers import DTYPES, Checkpoint
from ...export.fold import Fold
from ...guard.base.progress import track

PLACES = 4.75
"""Rounding to nearest leaves half a unit in the last place, each of repair's two steps may move an entry by another;
where a power of two lies between, the units above it count twice in units of the number below it."""

ARITHMETIC = 1e-6
"""What float32 arithmetic in another order moves an entry by, relative to the tensor's largest."""


def places_off(source: Checkpoint, folded: Checkpoint, fold: Fold) -> dict[str, float]:
    """Edited tensor -> the largest |file - fold before rounding| of its entries, in units in the last place of what the
    fold says, beyond what float32 arithmetic explains. Reads both files in blocks of rows.
    """
    return {name: _places_off(source, folded, fold, name) for name in track(sorted(fold.changed), "written")}


def _places_off(source: Checkpoint, folded: Checkpoint, fold: Fold, name: str) -> float:
    shape = (0, *fold.grown[name][1:]) if name in fold.new else source.info(name).shape
    exact = Folded(partial(source.read, name), shape, fold.edits.get(name, ()), fold.grown.get(name))
    dtype = DTYPES[folded.info(name).dtype]
    blocks = row_blocks(exact.shape)
    largest = max((float(exact.rows(*block).abs().max()) for block in blocks), default=0.0)
    worst = (_off(exact.rows(*block), folded.read(name, *block), dtype, largest) for block in blocks)
    return max(worst, default=0.0)


def _off(exact: Tensor, written: Tensor, dtype: torch.dtype, largest: float) -> float:
    info = torch.finfo(dtype)
    exact = exact.double()
    place = torch.exp2(exact.abs().clamp(min=info.tiny).log2().floor()) * info.eps
    off = (written.double() - exact).abs() - ARITHMETIC * largest
    return float((off.clamp(min=0) / place).max()) if off.numel() else 0.0
