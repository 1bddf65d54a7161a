"""Interventions as edits of tensors. Pure: numbers in, numbers out; no files, no models.

An edit works in blocks of rows (slices along the first axis), so that a tensor of any size passes through little
memory: first `observe` sees every block, then `apply` turns each into what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..guard.errors import InputError
from ..guard.guard import Guard, Intervention, SharedProjection, SublayerProjection
from .writers import Family, Writer

BLOCK_BYTES = 4 * 2**20
"""Size of a float32 block of rows: large enough to amortise a read, small enough to stay in the cache."""


def project_out(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """What `weight` writes, without its component in span(basis): W - strength V^T (V W).

    weight: [d, ...], rows indexed by the residual stream.  basis: V, [m, d], orthonormal rows.
    Returns [d, ...] in float32 or better.  Source: weight orthogonalisation, Arditi et al. 2024.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    basis = basis.to(weight)
    return weight - strength * torch.tensordot(basis.T, torch.tensordot(basis, weight, 1), 1)


class Edit(Protocol):
    """One change of one tensor, block by block."""

    two_pass: bool
    """Whether `observe` must see every block before `apply` may be called."""

    def observe(self, block: Tensor, first: int) -> None:
        """Takes note of rows first, first + 1, ... of the tensor, float32 or better."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        """What takes the place of these rows, same shape."""


@dataclass
class ProjectRows:
    """W - strength V^T (V W) for W [d, ...], rows indexed by the residual stream: o_proj, down_proj, biases."""

    basis: Tensor
    strength: float
    two_pass = True
    component: Tensor | None = None
    """V W, summed up over the blocks seen so far, [m, ...]."""

    def observe(self, block: Tensor, first: int) -> None:
        part = torch.tensordot(self.basis[:, first : first + len(block)].to(block), block, 1)
        self.component = part if self.component is None else self.component + part

    def apply(self, block: Tensor, first: int) -> Tensor:
        assert self.component is not None, "apply before observe"
        rows = self.basis[:, first : first + len(block)].to(block)
        return block - self.strength * torch.tensordot(rows.T, self.component, 1)


@dataclass
class ProjectColumns:
    """W - strength (W V^T) V for W [..., d], columns indexed by the residual stream: embedding tables."""

    basis: Tensor
    strength: float
    two_pass = False

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: each row is projected on its own."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        basis = self.basis.to(block)
        return block - self.strength * (block @ basis.T) @ basis


def _project(writer: Writer, shape: Sequence[int], basis: Tensor, strength: float) -> Edit:
    if writer.axis == 0:
        return ProjectRows(basis, strength)
    if writer.axis == len(shape) - 1:
        return ProjectColumns(basis, strength)
    raise InputError(f"{writer.disk}: cannot fold along axis {writer.axis} of {list(shape)}")


@dataclass(frozen=True)
class Fold:
    """A guard as edits of a checkpoint.

    edits: tensor's name on disk -> its edits, in the guard's order.  untie: whether the head must become a tensor of
    its own (a copy of the embedding as it was), because the embedding is edited and the head must not be.
    """

    edits: Mapping[str, Sequence[Edit]]
    untie: bool


def fold(guard: Guard, family: Family, shapes: Mapping[str, Sequence[int]]) -> Fold:
    """The edits that make `family`'s checkpoint equal to the model with `guard`'s hooks attached.

    shapes: tensor's name on disk -> shape.  Raises InputError if an intervention does not fit the model or cannot be
    held by weights.
    """
    guard.check_fits(family.layers, family.width)
    edits: dict[str, list[Edit]] = {}
    for each in guard.interventions:
        for name, edit in _edits(each, family, shapes):
            edits.setdefault(name, []).append(edit)
    return Fold(edits, untie=family.tied and family.embedding in edits)


def _edits(each: Intervention, family: Family, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Edit]]:
    """(tensor's name on disk, edit) for every tensor that `each` changes."""
    if isinstance(each, SublayerProjection):
        for writer in family.writers:
            if writer.layer is not None and writer.layer in each.bases:
                yield writer.disk, _project(writer, shapes[writer.disk], each.bases[writer.layer], each.strength)
    elif isinstance(each, SharedProjection):
        if not family.pre_norm:
            raise InputError(
                f"{each.kind}: {family.text_model_type} norms what its layers write: no edit of the writers is exact; "
                "use --scope sublayers"
            )
        for writer in family.writers:
            yield writer.disk, _project(writer, shapes[writer.disk], each.basis, each.strength)
    else:
        raise InputError(f"{each.kind}: weights cannot hold it; it runs with hooks only")


def row_blocks(shape: Sequence[int], size: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """(first, last) of blocks of rows that take about `size` bytes each in float32."""
    row_bytes = 4 * max(1, torch.Size(shape[1:]).numel())
    step = max(1, size // row_bytes)
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


class Folded:
    """One tensor with its edits applied, read by rows, unrounded. The edits it is given are left as they are.

    read: (first, last) -> those rows of the tensor, in its own dtype.
    """

    def __init__(self, read: Callable[[int, int], Tensor], shape: Sequence[int], edits: Sequence[Edit]) -> None:
        self._read = read
        self._edits: list[Edit] = []
        for edit in map(copy, edits):
            if edit.two_pass:
                for first, last in row_blocks(shape):
                    edit.observe(self.rows(first, last), first)
            self._edits.append(edit)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first:last after all edits, float32 or better."""
        block = self._read(first, last)
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        for edit in self._edits:
            block = edit.apply(block, first)
        return block
