"""A model that computes straight from its files: each weight is read when a module needs it and dropped right after.

So a checkpoint far larger than memory can be run in float32 and compared, at the price of one read of it per pass. The
weights may be edited on the way, unrounded: what a fold would compute if numbers had no last bit.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..export.checkpoint import Checkpoint, open_regular, read_rows
from ..export.edits import Folded, row_blocks
from ..export.fold import Fold
from ..export.names import memory_to_disk, tied_names
from ..guard.errors import InputError
from ..guard.vlm import meta_model

MULTIPLY_BYTES = 32 * 2**20
"""Float32 block of a matrix that is multiplied at a time."""

M_MMAP_THRESHOLD = -3
"""The option's number in glibc's malloc.h."""

KEPT_ENTRIES = 2**16
"""A module's own parameters up to this many are read once and kept: gains, biases, and vectors such as image_newline,
which some classes use outside the module's forward."""


class _Weights:
    """The tensors of a checkpoint by their names in memory, float32 or better, read by rows, edited on the way."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, fold: Fold) -> None:
        self.checkpoint = checkpoint
        self.disk = memory_to_disk(model, [*checkpoint.tensors, *fold.new])
        self.tied = {
            name: self.disk[of] for name, of in tied_names(model).items() if name not in self.disk and of in self.disk
        }
        self.files = {shard.path: open_regular(checkpoint.folder, shard.path.name) for shard in checkpoint.shards}
        self.folded = {
            name: Folded(
                partial(self._raw, name),
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

    def shape(self, name: str) -> tuple[int, ...]:
        disk = self.disk.get(name)
        return self.folded[disk].shape if disk in self.folded else self.checkpoint.info(disk or self.tied[name]).shape

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first:last of the parameter `name`, read and edited in small blocks into one tensor.

        A tied head reads its embedding as it was, never the edited one.
        """
        rows: Tensor | None = None
        for start, stop in row_blocks((last - first, *self.shape(name)[1:])):
            block = self._block(name, first + start, first + stop)
            if rows is None:
                rows = block.new_empty(last - first, *block.shape[1:])
            rows[start:stop] = block
        return self._block(name, first, last) if rows is None else rows

    def whole(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.rows(name, 0, shape[0]) if shape else self._block(name, 0, 1)

    def _block(self, name: str, first: int, last: int) -> Tensor:
        disk = self.disk.get(name)
        if disk in self.folded:
            return self.folded[disk].rows(first, last)
        block = self._raw(disk or self.tied[name], first, last)
        return block.to(torch.promote_types(block.dtype, torch.float32)) if block.is_floating_point() else block


def _linear(weights: _Weights, name: str, module: nn.Linear, states: Tensor) -> Tensor:
    product = states.new_empty(*states.shape[:-1], module.out_features)
    for first, last in row_blocks(module.weight.shape, MULTIPLY_BYTES):
        product[..., first:last] = F.linear(states, weights.rows(f"{name}.weight", first, last))
    return product if module.bias is None else product + weights.whole(f"{name}.bias")


def _embedding(weights: _Weights, name: str, _module: nn.Embedding, ids: Tensor) -> Tensor:
    unique, place = ids.unique(return_inverse=True)
    return torch.cat([weights.rows(f"{name}.weight", int(row), int(row) + 1) for row in unique])[place]


def _lend(weights: _Weights, name: str, own: Sequence[str], module: nn.Module, _args: object) -> None:
    for each in own:
        setattr(module, each, nn.Parameter(weights.whole(f"{name}.{each}" if name else each), requires_grad=False))


def _take_back(own: Mapping[str, nn.Parameter], module: nn.Module, _args: object, _output: object) -> None:
    for each, empty in own.items():
        setattr(module, each, empty)


@contextmanager
def streamed(checkpoint: Checkpoint, fold: Fold | None = None, config: Path | None = None) -> Iterator[PreTrainedModel]:
    """The model of `checkpoint`, computing in float32 from its files, with `fold` applied and not rounded.

    config: the folder whose config.json says what the folded model looks like, if not the checkpoint's own.
    Raises InputError if the checkpoint lacks a tensor or one has another shape than config.json says.
    """
    _map_large_blocks()
    model = meta_model(config or checkpoint.folder)
    weights = _Weights(checkpoint, model, fold or Fold({}))
    try:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in weights.disk and name not in weights.tied:
                raise InputError(f"{checkpoint.folder}: no tensor for {name}")
            if weights.shape(name) != tuple(tensor.shape):
                raise InputError(
                    f"{checkpoint.folder}: {name} has shape {list(weights.shape(name))}, "
                    f"config.json says {list(tensor.shape)}"
                )
        for name, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if type(module) is nn.Linear:
                module.forward = partial(_linear, weights, name, module)  # type: ignore[method-assign]
            elif type(module) is nn.Embedding:
                module.forward = partial(_embedding, weights, name, module)  # type: ignore[method-assign]
            elif sum(parameter.numel() for parameter in own.values()) <= KEPT_ENTRIES:
                _lend(weights, name, list(own), module, None)
            else:
                module.register_forward_pre_hook(partial(_lend, weights, name, list(own)))
                module.register_forward_hook(partial(_take_back, own))
            for each in module._buffers.keys() - module._non_persistent_buffers_set:
                setattr(module, each, weights.whole(f"{name}.{each}" if name else each))
        yield model
    finally:
        weights.close()


def _map_large_blocks() -> None:
    """Asks glibc to map every block over 1 MB on its own, so that freeing it gives its memory back at once.

    By default its threshold grows with what is freed, up to 32 MB, and a pass over a large model then leaves a heap of
    holes behind: measured on 4 GB of weights, a peak of 803 MB instead of 537 MB. Elsewhere this does nothing.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, 2**20)
