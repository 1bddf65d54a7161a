"""Rounding that a projection survives. Numbers in, numbers out; no files, no models, no state but buffers used again.

Weights lie on the grid of their dtype, so a correction below half a step is dropped by rounding to nearest: in bfloat16
it leaves about 1 % of the removed component, a quarter of it where the component is weak. `repaired` rounds to nearest
but for a few of the d rows, which make up for what rounding all of them puts back along V:

1. Those are CANDIDATES rows: the ones with the largest |v_i|, which can make up for most, and FINE others, evenly
   spaced down to the smallest. All the rest leave R = V (W' - W), [m, n], a sum over them.
2. Of all roundings of the candidates that bring R to nothing, the one nearest to W minimises |W' - W|^2 + 2 p . R, p
   [m, n] being the multipliers, and that can be done entry by entry: W'_i = round(W_i - v_i . p). Each round of p +=
   (V V^T)^-1 R, V of the candidates, comes closer; no entry is shifted by more than a step.
3. What is left is less than one entry's step times its v_i. Some of the candidates, from the largest |v_i| to the
   smallest, take it away ever more finely, one after the other: s = clamp(round((t + p e) / (1 + p)), -1, 1),
   W'_i -= s step, R -= v_i s step, with t = v_i . R / (|v_i|^2 step), the steps that would remove R, and
   e = (W'_i - W_i) / step, those that would remove the error. Its price p falls from PRICE to 0: at first only entries
   that are nearly half a step off move, and only back over the exact value; at last, whatever removes R.

How well that can do depends on d: a column of d entries has only so many roundings. From d = 256 m on, the residual is
below 1e-5 of the component and the error of the weights within 5 % of round-to-nearest's, if the component is no weaker
than that of a random direction; tests/export/checkpoint/test_rounding.py has the figures for narrower
tensors and weaker components. Source of the second step: Lagrangian relaxation of a separable problem (Everett 1963).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .edits import Folded, row_blocks

Rounding = Literal["repair", "nearest"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)

REPAIRED = {"F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that are repaired, by their safetensors names; wider ones lose nothing worth it."""

CANDIDATES, FINE = 512, 64

SPARE = 2**18
"""Entries that candidates may be where columns are few, as in a bias: so many cost next to nothing."""

REPAIR_ROUNDS = 2
"""Of multipliers; a third hardly improves on the second, for the last step finishes what is left."""

FINISHING, FINISHING_A_RANK = 256, 64
"""Candidates that the last step uses: so many, and so many for each direction if that is more."""

PRICE, PRICED = 2.0, 0.3
"""What the error costs at first, and the share of those candidates to which it costs anything."""

COLUMNS = 512
"""Columns whose multipliers are found together: with their candidates, they stay in the cache."""

FINISHED = 16384
"""Columns that the last step takes together: enough to amortise the calls for each candidate."""

TOGETHER = 8
"""Candidates whose steps are computed together."""

SLICE_COLUMNS = 2048
"""Columns held until they are repaired, of embeddings and experts: [2048, 4096] in two bytes each are 16 MB."""

ERRORS = torch.bfloat16
"""Rounding errors are kept in this dtype: three digits are enough to tell cheap moves from dear ones."""

NO_DIRECTION = 1e-6
"""Candidates with a smaller |v_i| remove nothing; dividing by its square would overflow."""

EXPONENT = 0x7F800000
"""Keeps of a float32's bits those of its power of two."""

EXPONENT_OF_INVERSE = 0x7F000000
"""Minus the bits of a power of two, these are the bits of its inverse; of 0 it is 2^127, so that 0 times it is 0."""


class Run(NamedTuple):
    """Rows first:last of a tensor, which stand at `place` and after in a block."""

    first: int
    last: int
    place: int


Block = tuple[Tensor, Sequence[Run]]
"""Rows, and which rows of the tensor some of them are."""


def nearest(folded: Folded, dtype: torch.dtype) -> Iterator[Block]:
    """Returns the folded tensor in `dtype`, each row once, rounded to nearest."""
    for first, last in row_blocks(folded.shape):
        yield folded.rows(first, last).to(dtype), [Run(first, last, 0)]


def repaired(folded: Folded, dtype: torch.dtype, basis: Tensor, axis: int) -> Iterator[Block]:
    """Returns the same, in no particular order, rounded so that V W' = V W as nearly as it can be.

    What is yielded is overwritten by what comes next.
    dtype: float16 or bfloat16.  basis: V, [m, d], float32; rows need not be orthonormal.  axis: the one of the tensor
    that is d long; the others number columns.
    """
    # a. No entries, nothing to make up for.
    if not all(folded.shape):
        return nearest(folded, dtype)
    # b. V along the first axis: a block of rows is a part of every column, and R is known after the last one.
    if axis == 0:
        return _by_rows(folded, dtype, basis)
    # c. V along another: a slice of the first axis has whole columns, and is done when it has been read.
    return _by_slices(folded, dtype, basis, axis)


def candidates(basis: Tensor, columns: int) -> Tensor:
    """Returns which of the d rows make up for the others, in their order: all of them if d <= CANDIDATES or columns are
    few.
    """
    # 1. The largest |v_i| make up for most; the evenly spaced others, down to the smallest, for what those overshoot.
    order = basis.norm(dim=0).argsort(descending=True)
    count = max(CANDIDATES, SPARE // columns)
    if len(order) > count:
        large, others = order[: count - FINE], order[count - FINE :]
        order = torch.cat([large, others[torch.linspace(0, len(others) - 1, FINE).long()]])
    return order.sort().values


def _others(basis: Tensor, chosen: Tensor) -> Tensor:
    """V without the candidates."""
    return basis.index_fill(1, chosen, 0)


def _by_rows(folded: Folded, dtype: torch.dtype, basis: Tensor) -> Iterator[Block]:
    """Along the first axis R is known after the last row: candidates are held back until then."""
    shape = (-1, *folded.shape[1:])
    columns = torch.Size(folded.shape[1:]).numel()
    chosen = candidates(basis, columns)
    others = _others(basis, chosen)
    order, finishing = _finishing(basis[:, chosen], columns)
    places = order.argsort()
    held, residual = _used_again("held", (len(chosen), columns)), torch.zeros(len(basis), columns)
    for first, last in row_blocks(folded.shape):
        exact = folded.rows(first, last).reshape(last - first, columns)
        place, end = torch.searchsorted(chosen, torch.tensor([first, last])).tolist()
        held.index_copy_(0, places[place:end], exact[chosen[place:end] - first])
        rounded = exact.to(dtype)
        residual.addmm_(others[:, first:last], rounded.float().sub_(exact))  # R += V (W' - W), candidates left out
        # What lies between two candidates is final; a candidate itself is yielded after the last block.
        edges = [first - 1, *chosen[place:end].tolist(), last]
        yield rounded.reshape(shape), [Run(a + 1, b, a + 1 - first) for a, b in pairwise(edges) if a + 1 < b]
    chosen = chosen[order]
    repair(held, dtype, basis[:, chosen], residual, finishing)
    for first, last in row_blocks(held.shape):
        numbers = chosen[first:last].tolist()
        yield held[first:last].to(dtype).reshape(shape), [Run(row, row + 1, at) for at, row in enumerate(numbers)]


def _by_slices(folded: Folded, dtype: torch.dtype, basis: Tensor, axis: int) -> Iterator[Block]:
    """Along any other axis each slice of the first is a matrix of its own; about SLICE_COLUMNS columns at a time."""
    count, width = folded.shape[0], basis.shape[1]
    per_slice = torch.Size(folded.shape[1:]).numel() // width
    chosen = candidates(basis, count * per_slice)
    others = _others(basis, chosen)
    order, finishing = _finishing(basis[:, chosen], count * per_slice)
    chosen = chosen[order]
    together = min(count, max(1, SLICE_COLUMNS // per_slice))
    buffer = _used_again("rounded", (together, *folded.shape[1:]), dtype)
    for start in range(0, count, together):
        rounded = buffer[: min(together, count - start)]
        held = _used_again("held", (len(rounded) * per_slice, len(chosen)))
        residual = torch.empty(len(basis), len(held))
        for first, last in row_blocks(rounded.shape):
            exact = folded.rows(start + first, start + last)
            part = slice(first * per_slice, last * per_slice)
            torch.index_select(exact.movedim(axis, -1).reshape(-1, width), 1, chosen, out=held[part])
            error = rounded[first:last].copy_(exact).float().sub_(exact)
            residual[:, part] = others @ error.movedim(axis, 0).reshape(width, -1)
        repair(held.T, dtype, basis[:, chosen], residual, finishing)
        turned = rounded.movedim(axis, -1)
        turned.index_copy_(-1, chosen, held.to(dtype).reshape(*turned.shape[:-1], -1))
        yield rounded, [Run(start, start + len(rounded), 0)]


_kept = threading.local()


def _used_again(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised, and the same memory at every call of a thread, for fresh memory costs more than what is computed
    in it: 9 ms for the candidates of a down_proj, 22 MB. So a thread repairs one tensor at a time.
    """
    size, kept = math.prod(shape), getattr(_kept, name, None)
    if kept is None or len(kept) < size or kept.dtype != dtype:
        kept = torch.empty(size, dtype=dtype)
        setattr(_kept, name, kept)
    return kept[:size].view(shape)


def repair(held: Tensor, dtype: torch.dtype, basis: Tensor, residual: Tensor, finishing: int) -> None:
    """Rounds candidates to numbers that `dtype` has, so that R becomes as small as it can.

    held: [K, n], float32; changed in place, for a second copy would count.  basis: V, [m, K].  residual: R of all rows
    but these, [m, n]; it becomes that of all.  finishing: so many of the first candidates take the third step.
    """
    inverse = torch.linalg.pinv(basis @ basis.T, hermitian=True)  # pinv: rows of V may depend on one another
    priced = math.ceil(PRICED * finishing)
    errors = _used_again("errors", (priced, held.shape[1]), ERRORS)
    # 2. By multipliers, columns by columns; the errors of those that the next step may move back are kept.
    for first in range(0, held.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        exact = held[:, part]
        rounded, residual[:, part] = _by_multipliers(exact, dtype, basis, inverse, residual[:, part])
        errors[:, part] = rounded[:priced].float().sub_(exact[:priced])
        exact.copy_(rounded)
    # 3. Candidate by candidate, all columns together.
    values = held[:finishing].contiguous()
    _finish(values, errors, dtype, basis[:, :finishing], residual)
    held[:finishing] = values


def _by_multipliers(
    exact: Tensor, dtype: torch.dtype, basis: Tensor, inverse: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns (W', R): the second step of the module's. No entry is moved where one might overflow."""
    limits = torch.finfo(dtype)
    most = exact.abs()
    # 2a. An entry near the largest number of the dtype, or not finite: round to nearest, for the writer to see it.
    movable = bool(most.amax() * (1 + limits.eps) < limits.max)
    # 2b. Else entries are shifted by v_i . p, by eps |W_i| / 2 at most, which is a step at most, and rounded then.
    most.mul_(limits.eps / 2)
    rounded = exact.to(dtype)
    residual = others + basis @ rounded.float().sub_(exact)
    multipliers, shifted = torch.zeros_like(residual), torch.empty_like(exact)
    for _ in range(REPAIR_ROUNDS if movable else 0):
        multipliers += inverse @ residual  # p += (V V^T)^-1 R
        torch.mm(basis.T, multipliers, out=shifted).clamp_(-most, most)
        rounded = torch.sub(exact, shifted, out=shifted).to(dtype)
        residual = others + basis @ rounded.float().sub_(exact)
    return rounded, residual


def _finishing(basis: Tensor, columns: int) -> tuple[Tensor, int]:
    """Returns (order, k): in this order the first k candidates take the third step of the module's, the largest |v_i|
    first.
    """
    norms = basis.norm(dim=0)
    order = norms.argsort(descending=True)
    able = int((norms > NO_DIRECTION).sum())
    count = min(able, max(FINISHING, FINISHING_A_RANK * len(basis), SPARE // columns))
    takes = torch.zeros(len(order), dtype=torch.bool).index_fill(0, torch.linspace(0, able - 1, count).long(), True)
    return torch.cat([order[takes], order[~takes]]), int(takes.sum())


def _finish(values: Tensor, errors: Tensor, dtype: torch.dtype, basis: Tensor, residual: Tensor) -> None:
    """The third step of the module's, by rows in the order of `values` [k, n]; `errors` is W' - W of those at the start
    to which it costs anything. Changes values and residual in place.
    """
    prices = PRICE * (1 - torch.arange(len(values)) / (PRICED * len(values))).clamp(min=0)
    for first in range(0, values.shape[1], FINISHED):
        part = slice(first, first + FINISHED)
        rest = residual[:, part].contiguous()
        for start in range(0, len(values), TOGETHER):
            some = slice(start, start + TOGETHER)
            moving, error = values[some, part], errors[some, part].float()
            error = torch.cat([error, error.new_zeros(len(moving) - len(error), len(rest[0]))])
            _move(moving, error, dtype, basis[:, some], prices[some], rest)
        residual[:, part] = rest


def _move(values: Tensor, errors: Tensor, dtype: torch.dtype, basis: Tensor, prices: Tensor, residual: Tensor) -> None:
    """Moves each row of `values` [k, n] in turn to make up for `residual` [m, n], which is brought up to date."""
    limits = torch.finfo(dtype)
    # The step of an entry is eps times its power of two, read from its bits:
    # a. of bfloat16 down to 0, since its exponents are float32's;
    # b. of float16 from its smallest normal number on, below which all steps are that one's.
    power = (values.view(torch.int32) & EXPONENT).view(torch.float32)
    if dtype == torch.float16:
        power.clamp_(min=limits.tiny)
    inverse = (EXPONENT_OF_INVERSE - power.view(torch.int32)).view(torch.float32).unbind()
    steps = power.mul_(limits.eps).unbind()
    # s = clamp(round((t + p e) / (1 + p)), -1, 1), in two terms: what R wants of it, and what its own error pulls back.
    shares = 1 / (1 + prices) / limits.eps
    wanting = (basis * shares / basis.square().sum(0)).T.contiguous().unbind()
    pulls = errors.mul_((prices * shares)[:, None]).unbind()
    moves = torch.empty_like(values)
    for number, (move, v) in enumerate(zip(moves.unbind(), basis.T.contiguous().unbind(), strict=True)):
        torch.addmv(pulls[number], residual.T, wanting[number], out=move)
        move.mul_(inverse[number]).round_().clamp_(-1, 1).mul_(steps[number])
        residual.addr_(v, move, alpha=-1)  # R -= v_i s step
    # a. All were finite: a move may not make one infinite.  b. One was not: it stays so, for the writer to see it.
    finite = limits.min <= values.amin() and values.amax() <= limits.max
    values.sub_(moves)
    if finite:
        values.clamp_(limits.min, limits.max)
