"""Rounding that a projection survives. Pure: numbers in, numbers out; no files, no models.

Weights lie on the grid of their dtype, so a correction below half a step is dropped by rounding to nearest: in bfloat16
it leaves about 1 % of the removed component, a quarter of it where the component is weak. `repaired` rounds to nearest
and then moves a few entries by one step, so that what the tensor writes along V is what the exact fold writes:

1. R = V (W' - W), [m, n]: what rounding W [d, n] to W' put back along V.
2. Candidates are CANDIDATES of the d rows: half of them those with the largest |v_i|, which remove R fast; the others
   evenly spaced down to the smallest, which remove what is left ever more finely. Largest first, each of them once:
   s = clamp(round((t + p e) / (1 + p)), -1, 1),  W'_i -= s step,  R -= v_i s step,  with t = v_i . R / (|v_i|^2 step),
   the steps that would remove R, and e = (W'_i - W_i) / step, the step that would remove the rounding error.
3. p, the price of weight error, falls from PRICE to 0: at first only entries that rounding put nearly half a step off
   move, and only back over the exact value, which hardly adds to the error; at last, whatever removes R.

How well that can do depends on d: a column of d entries has only so many roundings. From d = 256 m on, the residual is
below 1e-5 of the component and the error of the weights within 5 % of round-to-nearest's, if the component is no weaker
than that of a random direction; tests/test_rounding.py has the figures for narrower tensors and weaker components.
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

CANDIDATES = 512
PRICE = 8.0
"""Of CANDIDATES candidates; of fewer it is less, as the root of their number: so many steps removing R takes."""

PRICED = 0.3
"""Share of the candidates that pay a price."""

COLUMNS = 4096
"""Columns repaired together: enough to amortise the calls for each candidate, few enough to stay in the cache."""

TOGETHER = 32
"""Candidates whose steps are computed together."""

SLICE_COLUMNS = 2048
"""The same where whole slices are held until they are repaired, as in an embedding: [2048, 4096] are 16 MB."""

ERRORS = torch.bfloat16
"""Rounding errors are kept in this dtype: three digits are enough to tell cheap moves from dear ones."""

NO_DIRECTION = 1e-12
"""Candidates with a smaller |v_i|^2 remove nothing; dividing by it would overflow."""

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


def candidates(basis: Tensor) -> Tensor:
    """Which of the d rows are repaired, in their order: all of them if d <= CANDIDATES."""
    order = basis.norm(dim=0).argsort(descending=True)
    if len(order) > CANDIDATES:
        large, others = order[: CANDIDATES // 2], order[CANDIDATES // 2 :]
        order = torch.cat([large, others[torch.linspace(0, len(others) - 1, CANDIDATES - len(large)).long()]])
    return order.sort().values


def _by_rows(folded: Folded, dtype: torch.dtype, basis: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Along the first axis R is known after the last row: candidates are held back until then."""
    columns = torch.Size(folded.shape[1:]).numel()
    chosen = candidates(basis)
    held, errors = torch.empty(len(chosen), columns, dtype=dtype), torch.empty(len(chosen), columns, dtype=ERRORS)
    residual = torch.zeros(len(basis), columns)
    for first, last in row_blocks(folded.shape):
        exact = folded.rows(first, last)
        rounded = torch.empty(exact.shape, dtype=dtype)
        error = _round(exact, rounded).reshape(last - first, columns)
        residual.addmm_(basis[:, first:last], error)
        place, end = torch.searchsorted(chosen, torch.tensor([first, last])).tolist()
        rows = chosen[place:end] - first
        torch.index_select(rounded.reshape(last - first, columns), 0, rows, out=held[place:end])
        errors[place:end] = error.index_select(0, rows)
        start = 0
        for row in [*rows.tolist(), last - first]:
            if row > start:
                yield first + start, rounded[start:row]
            start = row + 1
    repair(held, errors, basis[:, chosen], residual)
    for place, row in enumerate(chosen.tolist()):
        yield row, held[place].reshape(1, *folded.shape[1:])


def _by_slices(folded: Folded, dtype: torch.dtype, basis: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
    """Along any other axis each slice of the first is a matrix of its own; about COLUMNS columns at a time."""
    count, width = folded.shape[0], basis.shape[1]
    per_slice = torch.Size(folded.shape[1:]).numel() // width
    chosen = candidates(basis)
    together = min(count, max(1, SLICE_COLUMNS // max(1, per_slice)))
    buffer = torch.empty(together, *folded.shape[1:], dtype=dtype)
    candidate_errors = torch.empty(together, len(chosen), per_slice, dtype=ERRORS)
    for start in range(0, count, together):
        size = min(together, count - start)
        rounded, errors = buffer[:size], candidate_errors[:size]
        residual = torch.empty(len(basis), size * per_slice)
        for first, last in row_blocks(rounded.shape):
            error = _round(folded.rows(start + first, start + last), rounded[first:last])
            errors[first:last] = error.index_select(axis, chosen).movedim(axis, 1).reshape(errors[first:last].shape)
            part = slice(first * per_slice, last * per_slice)
            residual[:, part] = basis @ error.movedim(axis, 0).reshape(width, -1)
        held = rounded.index_select(axis, chosen)
        rows, row_errors = held.movedim(axis, 0).contiguous(), errors.movedim(1, 0).contiguous()
        repair(rows.flatten(1), row_errors.flatten(1), basis[:, chosen], residual)
        held.movedim(axis, 0).copy_(rows)
        yield start, rounded.index_copy_(axis, chosen, held)


def _round(exact: Tensor, rounded: Tensor) -> Tensor:
    """Rounds `exact` to nearest into `rounded`; returns the error of that, in float32."""
    rounded.copy_(exact)
    return rounded.float().sub_(exact)


def repair(held: Tensor, errors: Tensor, basis: Tensor, residual: Tensor) -> None:
    """Moves entries of `held` by one step at most, so that `residual` becomes as small as it can; both in place.

    held: [K, n], the candidates rounded to their dtype.  errors: [K, n], W' - W of the same.  basis: V, [m, K].
    residual: R = V (W' - W) over all rows, [m, n], float32.
    """
    squares = basis.square().sum(0)
    order = squares.argsort(descending=True)
    order = order[squares[order] > NO_DIRECTION]
    dear = PRICE * (len(order) / CANDIDATES) ** 0.5
    prices = dear * (1 - torch.arange(len(order)) / (PRICED * len(order))).clamp(min=0)
    for first in range(0, held.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        rest = residual[:, part].contiguous()
        for chosen, price in zip(order.split(TOGETHER), prices.split(TOGETHER), strict=True):
            values, error = held[chosen, part], errors[chosen, part]
            held[chosen, part] = _moved(values, error.float(), basis[:, chosen], squares[chosen], price, rest)
        residual[:, part] = rest


def _moved(values: Tensor, errors: Tensor, basis: Tensor, squares: Tensor, prices: Tensor, residual: Tensor) -> Tensor:
    """`values` [k, n] after each row in turn moved to make up for `residual` [m, n], which is brought up to date."""
    limits = torch.finfo(values.dtype)
    exact = values.float()
    power = (exact.view(torch.int32) & EXPONENT).view(torch.float32)
    if values.dtype == torch.float16:
        power.clamp_(min=limits.tiny)
    inverse = (EXPONENT_OF_INVERSE - power.view(torch.int32)).view(torch.float32).unbind()
    steps = power.mul_(limits.eps).unbind()
    shares = 1 / (1 + prices) / limits.eps
    wanting = (basis * shares / squares).T.contiguous().unbind()
    pulls = errors.mul_((prices * shares)[:, None]).unbind()
    moves = torch.empty_like(exact)
    for number, (move, v) in enumerate(zip(moves.unbind(), basis.T.contiguous().unbind(), strict=True)):
        torch.addmv(pulls[number], residual.T, wanting[number], out=move)
        move.mul_(inverse[number]).round_().clamp_(-1, 1).mul_(steps[number])
        residual.addr_(v, move, alpha=-1)
    lowest, highest = torch.aminmax(exact)
    exact.sub_(moves)
    if limits.min <= lowest and highest <= limits.max:  # else it is not finite, and stays so for the writer to see
        exact.clamp_(limits.min, limits.max)
    return exact.to(values.dtype)
