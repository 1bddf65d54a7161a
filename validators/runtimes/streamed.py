"""A model that computes straight from its files: each weight is read when a module needs it and dropped right after.

So a checkpoint far larger than memory can be run in float32 and compared, at the price of one read of it per pass. The
weights may be edited on the way, unrounded: what a fold would compute if numbers had no last bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...export.checkpoint.edits import Folded, row_blocks
from ...export.checkpoint.headers import Checkpoint, read_rows
from ...export.checkpoint.layout import Layout
from ...export.checkpoint.memory import map_blocks_from
from ...export.families.table import head_of, module_name
from ...export.fold import Fold
from ...guard.base.errors import InputError
from ...guard.base.untrusted import open_regular

MULTIPLY_BYTES = 32 * 2**20
"""Float32 block of a matrix that is multiplied at a time."""

KEPT_ENTRIES = 2**16
"""A module's own parameters up to this many are read once and kept: gains, biases, and vectors such as image_newline,
which some classes use outside the module's forward."""

KEPT_ROWS_ENTRIES = 2**22
"""So is an embedding up to this: GLM-4V's classes read their table of positions without calling it."""


class _Weights:
    """The tensors of a checkpoint by their names in memory, in `dtype`, read by rows, edited on the way."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, fold: Fold, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.layout = Layout(model, {**checkpoint.shapes, **fold.grown})
        self.tied = dict(self.layout.tied)
        if fold.untie:  # the config says untied already, the file does not yet
            head, embedding = head_of(model), model.get_input_embeddings()
            self.tied.setdefault(module_name(model, head) + "weight", module_name(model, embedding) + "weight")
        self.files = {shard.path: open_regular(checkpoint.folder, shard.path.name) for shard in checkpoint.shards}
        self.folded = {
            name: Folded(
                partial(self._wide_rows, name),
                (0, *fold.grown[name][1:]) if name in fold.new else checkpoint.info(name).shape,
                fold.edits.get(name, ()),
                fold.grown.get(name),
            )
            for name in fold.changed
        }

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)

    def _raw(self, disk: str, first: int, last: int) -> Tensor:
        shard, info = self.checkpoint.tensors[disk]
        return read_rows(self.files[shard.path], shard, info, first, last)

    def _wide_rows(self, disk: str, first: int, last: int) -> Tensor:
        return self._wide(self._raw(disk, first, last))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the parameter's shape as what is on disk gives it; None if there is nothing."""
        return self.layout.shapes.get(self.tied.get(name, name))

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Returns rows first:last of the parameter `name`, read and edited in small blocks into one tensor.

        A tied head reads its embedding as it was, never the edited one.
        """
        raw = name in self.tied
        disk = self.layout.plain(self.tied.get(name, name))
        if disk is None:
            return self.layout.assemble(name, self._tensor)[first:last]
        rows: Tensor | None = None
        for start, stop in row_blocks((last - first, *self.layout.shapes[self.tied.get(name, name)][1:])):
            block = self._block(disk, first + start, first + stop, raw)
            if rows is None:
                rows = block.new_empty(last - first, *block.shape[1:])
            rows[start:stop] = block
        return self._block(disk, first, last, raw) if rows is None else rows

    def whole(self, name: str) -> Tensor:
        shape = self.shape(name)
        if shape:
            return self.rows(name, 0, shape[0])
        disk = self.layout.plain(name)
        return self._block(disk, 0, 1) if disk else self.layout.assemble(name, self._tensor)

    def _tensor(self, disk: str) -> Tensor:
        return self._block(disk, 0, self.checkpoint.info(disk).shape[0])

    def _block(self, disk: str, first: int, last: int, raw: bool = False) -> Tensor:
        if disk in self.folded and not raw:
            return self._wide(self.folded[disk].rows(first, last))
        return self._wide_rows(disk, first, last)

    def _wide(self, block: Tensor) -> Tensor:
        return block.to(self.dtype) if block.is_floating_point() else block


def _linear(weights: _Weights, name: str, module: nn.Linear, states: Tensor) -> Tensor:
    product = states.new_empty(*states.shape[:-1], module.out_features)
    for first, last in row_blocks(module.weight.shape, MULTIPLY_BYTES):
        product[..., first:last] = F.linear(states, weights.rows(f"{name}.weight", first, last))
    return product if module.bias is None else product + weights.whole(f"{name}.bias")


def _embedding(weights: _Weights, name: str, _module: nn.Embedding, ids: Tensor) -> Tensor:
    unique, place = ids.unique(return_inverse=True)
    return torch.cat([weights.rows(f"{name}.weight", int(row), int(row) + 1) for row in unique])[place]


def _lend(weights: _Weights, name: str, own: Sequence[str], module: nn.Module, _args: object) -> None:
    for parameter in own:
        tensor = weights.whole(f"{name}.{parameter}" if name else parameter)
        setattr(module, parameter, nn.Parameter(tensor, requires_grad=False))


def _take_back(own: Mapping[str, nn.Parameter], module: nn.Module, _args: object, _output: object) -> None:
    for parameter, empty in own.items():
        setattr(module, parameter, empty)


@contextmanager
def streamed(
    checkpoint: Checkpoint, fold: Fold | None = None, like: Checkpoint | None = None, dtype: torch.dtype = torch.float32
) -> Iterator[PreTrainedModel]:
    """The model of `checkpoint`, computing in `dtype` from its files, with `fold` applied and not rounded.

    like: the checkpoint whose config.json says what the folded model looks like, if not this one.
    Raises InputError if the checkpoint lacks a tensor or one has another shape than config.json says.
    """
    map_blocks_from(2**20)
    model = (like or checkpoint).own_model(dtype)
    weights = _Weights(checkpoint, model, fold or Fold({}), dtype)
    try:
        for name, tensor in model.state_dict(keep_vars=True).items():
            shape = weights.shape(name)
            if shape is None:
                raise InputError(f"{checkpoint.folder}: no tensor for {name}")
            if shape != tuple(tensor.shape):
                raise InputError(
                    f"{checkpoint.folder}: {name} has shape {list(shape)}, config.json says {list(tensor.shape)}"
                )
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if type(module) is nn.Linear:
                module.forward = partial(_linear, weights, name, module)  # type: ignore[method-assign]
            elif type(module) is nn.Embedding and module.weight.numel() > KEPT_ROWS_ENTRIES:
                module.forward = partial(_embedding, weights, name, module)  # type: ignore[method-assign]
            elif type(module) is nn.Embedding or sum(buffer.numel() for buffer in own.values()) <= KEPT_ENTRIES:
                _lend(weights, name, list(own), module, None)
            else:
                module.register_forward_pre_hook(partial(_lend, weights, name, list(own)))
                module.register_forward_hook(partial(_take_back, own))
            for buffer in module._buffers.keys() - module._non_persistent_buffers_set:
                setattr(module, buffer, weights.whole(f"{name}.{buffer}" if name else buffer))
        yield model
    finally:
        weights.close()
