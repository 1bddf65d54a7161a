"""Edits of single tensors. Pure: numbers in, numbers out; no files, no models.

An edit works in blocks of rows (slices along the first axis), so that a tensor of any size passes through little
memory: first `observe` sees every block, then `apply` turns each into what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**20
"""Size of a float32 block of rows: large enough to amortise a read, small enough to stay in the cache."""


class Edit(Protocol):
    """One change of one tensor, block by block."""

    two_pass: bool
    """Whether `observe` must see every block before `apply` may be called."""

    def observe(self, block: Tensor, first: int) -> None:
        """Takes note of rows first, first + 1, ... of the tensor, float32 or better."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        """Returns what takes the place of these rows, same shape."""


@dataclass
class _Projection:
    """Takes `strength` of span(basis) out of what a tensor writes: y - strength (y V^T) V for what it writes, y.

    Under a post-norm, D y / rms(y), the component that reaches the stream is (D y) V^T. `gain` D, [d], makes the
    projection oblique, y - strength ((D y) V^T) (V D^-1): the stream gets none of it, but rms(y) has changed.
    """

    basis: Tensor
    strength: float
    gain: Tensor | None = None

    @property
    def reading(self) -> Tensor:
        """V D, [m, d]: what times y is the component."""
        return self.basis if self.gain is None else self.basis * self.gain

    @property
    def writing(self) -> Tensor:
        """V D^-1, [m, d]: what the component is taken out along."""
        return self.basis if self.gain is None else self.basis / self.gain


@dataclass
class ProjectRows(_Projection):
    """W - strength V^T (V W) for W [d, ...], rows indexed by the residual stream: o_proj, down_proj, biases.

    Source: weight orthogonalisation, Arditi et al. 2024.
    """

    two_pass = True
    component: Tensor | None = None
    """V W (V D W under a post-norm), summed up over the blocks seen so far, [m, columns]; of a vector in float64, for
    entries that are all alike nearly cancel out.
    """

    def observe(self, block: Tensor, first: int) -> None:
        summed = block.double() if block.ndim == 1 else block
        part = self.reading[:, first : first + len(block)].to(summed) @ _as_matrix(summed)
        self.component = part if self.component is None else self.component.add_(part)

    def apply(self, block: Tensor, first: int) -> Tensor:
        assert self.component is not None, "apply before observe"
        rows = self.writing[:, first : first + len(block)].to(block)
        less = torch.addmm(_as_matrix(block), rows.T, self.component.to(block), alpha=-self.strength)
        return less.reshape(block.shape)


def _as_matrix(block: Tensor) -> Tensor:
    """Returns rows of a tensor of any shape as [rows, columns]; those of a vector have one column."""
    return block.unsqueeze(-1).flatten(1)


@dataclass
class ProjectColumns(_Projection):
    """W - strength (W V^T) V for W [..., d], columns indexed by the residual stream: embedding tables, experts [E, n,
    d].
    """

    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: each row is projected on its own."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        flat = block.flatten(0, -2)
        component = flat @ self.reading.to(block).T
        return torch.addmm(flat, component, self.writing.to(block), alpha=-self.strength).reshape(block.shape)


@dataclass
class ProjectSlices(_Projection):
    """W_e - strength V^T (V W_e) for each slice of W [E, d, n] along its first axis: stacked experts."""

    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: each slice is projected on its own."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        return block - self.strength * self.writing.to(block).T @ (self.reading.to(block) @ block)


Projecting = ProjectRows | ProjectColumns | ProjectSlices
"""The edits that take a direction out of what a tensor writes."""


def taken(edit: Projecting, block: Tensor, first: int) -> Tensor:
    """V W (V D W under a post-norm), the component that `edit` takes away, of rows first, first + 1, ... of a tensor.

    Of rows [n, ...]: [m, ...], to be summed up over the blocks.  Of columns [n, ..., d]: [n, ..., m], and of slices
    [n, d, k]: [n, m, k], to be put one after the other.
    """
    reading = edit.reading.to(block)
    if isinstance(edit, ProjectRows):
        return torch.tensordot(reading[:, first : first + len(block)], block, 1)
    return block @ reading.T if isinstance(edit, ProjectColumns) else reading @ block


@dataclass(frozen=True)
class AddProduct:
    """W + L R for W [rows, columns], or W_e + L_e R_e for stacked ones, or b + L R for a vector b [rows].

    left: L, [rows, r] or [E, rows, r].  right: R, [r, columns], [E, r, columns] or [r].
    """

    left: Tensor
    right: Tensor
    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: what is added does not depend on what was there."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(block))
        right = self.right[rows] if self.right.ndim == 3 else self.right
        return block + self.left[rows].to(block) @ right.to(block)

    def turned(self) -> AddProduct:
        """Returns the same for the transposed tensor (of stacked ones: for each of them)."""
        return AddProduct(self.right.mT, self.left.mT)


@dataclass
class SetNorms:
    """Gives each row (axis 0) or column (axis 1) of W [rows, columns] the Euclidean norm in `norms`: DoRA's magnitude.

    Source: Liu et al. 2024, DoRA, equation 5.
    """

    norms: Tensor
    axis: int
    two_pass = True
    squares: Tensor | None = None
    """Of each column: the sum of squares over the blocks seen so far."""

    def observe(self, block: Tensor, first: int) -> None:
        part = block.square().sum(0)
        self.squares = part if self.squares is None else self.squares + part

    def apply(self, block: Tensor, first: int) -> Tensor:
        if self.axis == 0:
            norms = self.norms[first : first + len(block), None].to(block)
            return block * (norms / torch.linalg.norm(block, dim=1, keepdim=True))
        assert self.squares is not None, "apply before observe"
        return block * (self.norms.to(block) / self.squares.sqrt())


@dataclass(frozen=True)
class SetAll:
    """Puts `tensor` in place of what was there."""

    tensor: Tensor
    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: what was there does not matter."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        return self.tensor[first : first + len(block)].to(block)


@dataclass(frozen=True)
class SetRows:
    """Puts `rows`, row number -> [...] as wide as the tensor's rows, in place of what was there."""

    rows: Mapping[int, Tensor]
    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: rows are replaced whatever the others are."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        block = block.clone()
        for number, row in self.rows.items():
            if first <= number < first + len(block):
                block[number - first] = row.to(block)
        return block


@dataclass(frozen=True)
class SetColumns:
    """Puts `columns`, column number -> [rows], in place of what was there; W [rows, columns]."""

    columns: Mapping[int, Tensor]
    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: columns are replaced whatever the others are."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        block = block.clone()
        for number, column in self.columns.items():
            block[:, number] = column[first : first + len(block)].to(block)
        return block


def written_along(edits: Sequence[Edit]) -> tuple[Tensor, int] | None:
    """Returns (V, axis) of the projections among `edits`: what reads their components, [m, d] float32, one below the
    other, and the axis of the tensor that is d long; None if there are none.
    """
    axes: dict[type, int] = {ProjectRows: 0, ProjectColumns: -1, ProjectSlices: 1}
    found = [edit for edit in edits if isinstance(edit, Projecting)]
    return (torch.cat([edit.reading for edit in found]).float(), axes[type(found[0])]) if found else None


def row_blocks(shape: Sequence[int], size: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """Returns (first, last) of blocks of rows that take about `size` bytes each in float32."""
    row_bytes = 4 * max(1, torch.Size(shape[1:]).numel())
    step = max(1, size // row_bytes)
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


class Folded:
    """One tensor with its edits applied, read by rows, unrounded. The edits it is given are left as they are.

    read: (first, last) -> those rows of the tensor, in its own dtype.  shape: the tensor's.  grown: the shape it is to
    have, zeros being added at the end of each axis; default as it is.
    """

    def __init__(
        self,
        read: Callable[[int, int], Tensor],
        shape: Sequence[int],
        edits: Sequence[Edit],
        grown: Sequence[int] | None = None,
    ) -> None:
        self.shape = tuple(grown or shape)
        self._read, self._had = read, tuple(shape)
        self._edits: list[Edit] = []
        for edit in map(copy, edits):
            if edit.two_pass:
                for first, last in row_blocks(self.shape):
                    edit.observe(self.rows(first, last), first)
            self._edits.append(edit)

    def rows(self, first: int, last: int) -> Tensor:
        """Returns rows first:last after all edits, float32 or better."""
        block = self._padded(first, last)
        for edit in self._edits:
            block = edit.apply(block, first)
        return block

    def _padded(self, first: int, last: int) -> Tensor:
        """Returns rows first:last before any edit; zeros where the tensor had none."""
        held = min(last, self._had[0]) - first
        block = self._read(first, first + held) if held > 0 else torch.empty(0, *self.shape[1:])
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        if self.shape == self._had:
            return block
        padded = block.new_zeros(last - first, *self.shape[1:])
        if held > 0:
            padded[(slice(held), *(slice(size) for size in self._had[1:]))] = block
        return padded
