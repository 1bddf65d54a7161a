"""Rounding that a projection survives. Pure: numbers in, numbers out; no files, no models.

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
than that of a random direction; tests/test_rounding.py has the figures for narrower tensors and weaker components.
Source of the second step: Lagrangian relaxation of a separable problem (Everett 1963).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

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

ROUNDS = 2
"""Of multipliers; a third hardly improves on the second, for the last step finishes what is left."""

FINISHING, FINISHING_A_RANK = 256, 64
"""Candidates that the last step uses: so many, and so many for each direction if that is more."""

PRICE, PRICED = 2.0, 0.3
"""What the error costs at first, and the share of those candidates to which it costs anything."""

COLUMNS = 512
"""Columns whose multipliers are found together: with their candidates, they stay in the cache."""

FINISHED = 16384
"""Columns that the last step takes together: enough to amortise the calls for each candidate."""

TOGETHER = 16
"""Candidates whose steps are computed together."""

SLICE_COLUMNS = 4096
"""Columns held until they are repaired, of embeddings and experts: [4096, 4096] in two bytes each are 32 MB."""

ERRORS = torch.bfloat16
"""Rounding errors are kept in this dtype: three digits are enough to tell cheap moves from dear ones."""

NO_DIRECTION = 1e-6
"""Candidates with a smaller |v_i| remove nothing; dividing by its square would overflow."""

EXPONENT = 0x7F800000
"""Keeps of a float32's bits those of its power of two."""

EXPONENT_OF_INVERSE = 0x7F000000
"""Minus the bits of a power of two, these are the bits of its inverse; of 0 it is 2^127, so that 0 times it is 0."""


def nearest(folded: Folded, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows in `dtype`) of the folded tensor, each row once, rounded to nearest."""
    for first, last in row_blocks(folded.shape):
        yield first, folded.rows(first, last).to(dtype)


def repaired(folded: Folded, dtype: torch.dtype, basis: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """The same, in no particular order, rounded so that V W' = V W as nearly as it can be.

    What is yielded is overwritten by what comes next.
    dtype: float16 or bfloat16.  basis: V, [m, d], float32; rows need not be orthonormal.  axis: the one of the tensor
    that is d long; the others number columns.
    """
    return _by_rows(folded, dtype, basis) if axis == 0 else _by_slices(folded, dtype, basis, axis)


def candidates(basis: Tensor, columns: int) -> Tensor:
    """Which of the d rows make up for the others, in their order: all of them if d <= CANDIDATES or columns are few."""
    order = basis.norm(dim=0).argsort(descending=True)
    count = max(CANDIDATES, SPARE // max(1, columns))
    if len(order) > count:
        large, others = order[: count - FINE], order[count - FINE :]
        order = torch.cat([large, others[torch.linspace(0, len(others) - 1, FINE).long()]])
    return order.sort().values


def _others(basis: Tensor, chosen: Tensor) -> Tensor:
    """V without the candidates."""
    return basis.index_fill(1, chosen, 0)


def _by_rows(folded: Folded, dtype: torch.dtype, basis: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Along the first axis R is known after the last row: candidates are held back until then."""
    columns = torch.Size(folded.shape[1:]).numel()
    chosen = candidates(basis, columns)
    others = _others(basis, chosen)
    held, residual = torch.empty(len(chosen), columns), torch.zeros(len(basis), columns)
    for first, last in row_blocks(folded.shape):
        exact = folded.rows(first, last).reshape(last - first, columns)
        place, end = torch.searchsorted(chosen, torch.tensor([first, last])).tolist()
        rows = chosen[place:end] - first
        torch.index_select(exact, 0, rows, out=held[place:end])
        rounded = exact.to(dtype)
        residual.addmm_(others[:, first:last], rounded.float().sub_(exact))
        start = 0
        for row in [*rows.tolist(), last - first]:
            if row > start:
                yield first + start, rounded[start:row].reshape(-1, *folded.shape[1:])
            start = row + 1
    repair(held, dtype, basis[:, chosen], residual)
    for place, row in enumerate(chosen.tolist()):
        yield row, held[place].to(dtype).reshape(1, *folded.shape[1:])


def _by_slices(folded: Folded, dtype: torch.dtype, basis: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Along any other axis each slice of the first is a matrix of its own; about SLICE_COLUMNS columns at a time."""
    count, width = folded.shape[0], basis.shape[1]
    per_slice = torch.Size(folded.shape[1:]).numel() // width
    chosen = candidates(basis, count * per_slice)
    others = _others(basis, chosen)
    together = min(count, max(1, SLICE_COLUMNS // max(1, per_slice)))
    buffer = torch.empty(together, *folded.shape[1:], dtype=dtype)
    for start in range(0, count, together):
        rounded = buffer[: min(together, count - start)]
        held = torch.empty_like(rounded.index_select(axis, chosen), dtype=torch.float32)
        residual = torch.empty(len(basis), len(rounded) * per_slice)
        for first, last in row_blocks(rounded.shape):
            exact = folded.rows(start + first, start + last)
            torch.index_select(exact, axis, chosen, out=held[first:last])
            error = rounded[first:last].copy_(exact).float().sub_(exact)
            part = slice(first * per_slice, last * per_slice)
            residual[:, part] = others @ error.movedim(axis, 0).reshape(width, -1)
        turned = held.movedim(axis, 0)
        columns = turned.flatten(1)
        repair(columns, dtype, basis[:, chosen], residual)
        mended = columns.reshape(turned.shape).movedim(0, axis)
        yield start, rounded.index_copy_(axis, chosen, mended.to(dtype))


def repair(held: Tensor, dtype: torch.dtype, basis: Tensor, residual: Tensor) -> None:
    """Rounds candidates to numbers that `dtype` has, so that R becomes as small as it can.

    held: [K, n], float32; changed in place, for a second copy would count.  basis: V, [m, K].  residual: R of all rows
    but these, [m, n]; it becomes that of all.
    """
    inverse = torch.linalg.pinv(basis @ basis.T, hermitian=True)
    order = _finishing(basis, held.shape[1])
    errors = torch.empty(len(order), held.shape[1], dtype=ERRORS)
    for first in range(0, held.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        rounded, residual[:, part] = _by_multipliers(held[:, part], dtype, basis, inverse, residual[:, part])
        errors[:, part] = rounded[order].float().sub_(held[order, part])
        held[:, part] = rounded
    _finish(held, errors, dtype, basis, order, residual)


def _by_multipliers(
    exact: Tensor, dtype: torch.dtype, basis: Tensor, inverse: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """(W', R): the second step of the module's. No entry is moved where one might overflow."""
    limits = torch.finfo(dtype)
    most = exact.abs()
    movable = bool(most.amax() * (1 + limits.eps) < limits.max)  # false where one is not finite, for the writer to see
    most.mul_(limits.eps / 2)
    rounded = exact.to(dtype)
    residual = others + basis @ rounded.float().sub_(exact)
    multipliers, shifted = torch.zeros_like(residual), torch.empty_like(exact)
    for _ in range(ROUNDS if movable else 0):
        multipliers += inverse @ residual
        torch.mm(basis.T, multipliers, out=shifted).clamp_(-most, most)
        rounded = torch.sub(exact, shifted, out=shifted).to(dtype)
        residual = others + basis @ rounded.float().sub_(exact)
    return rounded, residual


def _finishing(basis: Tensor, columns: int) -> Tensor:
    """Which candidates take the third step of the module's, the largest |v_i| first."""
    norms = basis.norm(dim=0)
    order = norms.argsort(descending=True)
    order = order[norms[order] > NO_DIRECTION]
    count = min(len(order), max(FINISHING, FINISHING_A_RANK * len(basis), SPARE // max(1, columns)))
    return order[torch.linspace(0, len(order) - 1, count).long()]


def _finish(held: Tensor, errors: Tensor, dtype: torch.dtype, basis: Tensor, order: Tensor, residual: Tensor) -> None:
    """The third step of the module's, by the candidates in `order`, whose W' - W is `errors`; changes all in place."""
    prices = PRICE * (1 - torch.arange(len(order)) / (PRICED * len(order))).clamp(min=0)
    for first in range(0, held.shape[1], FINISHED):
        part = slice(first, first + FINISHED)
        rest = residual[:, part].contiguous()
        for start in range(0, len(order), TOGETHER):
            some = slice(start, start + TOGETHER)
            chosen = order[some]
            values, error = held[chosen, part], errors[some, part].float()
            held[chosen, part] = _moved(values, error, dtype, basis[:, chosen], prices[some], rest)
        residual[:, part] = rest


def _moved(
    values: Tensor, errors: Tensor, dtype: torch.dtype, basis: Tensor, prices: Tensor, residual: Tensor
) -> Tensor:
    """`values` [k, n] after each row in turn moved to make up for `residual` [m, n], which is brought up to date."""
    limits = torch.finfo(dtype)
    power = (values.view(torch.int32) & EXPONENT).view(torch.float32)
    if dtype == torch.float16:
        power.clamp_(min=limits.tiny)
    inverse = (EXPONENT_OF_INVERSE - power.view(torch.int32)).view(torch.float32).unbind()
    steps = power.mul_(limits.eps).unbind()
    shares = 1 / (1 + prices) / limits.eps
    wanting = (basis * shares / basis.square().sum(0)).T.contiguous().unbind()
    pulls = errors.mul_((prices * shares)[:, None]).unbind()
    moves = torch.empty_like(values)
    for number, (move, v) in enumerate(zip(moves.unbind(), basis.T.contiguous().unbind(), strict=True)):
        torch.addmv(pulls[number], residual.T, wanting[number], out=move)
        move.mul_(inverse[number]).round_().clamp_(-1, 1).mul_(steps[number])
        residual.addr_(v, move, alpha=-1)
    finite = limits.min <= values.amin() and values.amax() <= limits.max  # else the writer is to see it
    moved = values.sub_(moves)
    return moved.clamp_(limits.min, limits.max) if finite else moved
