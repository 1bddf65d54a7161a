"""A graph's weights, straight from the checkpoint: pointed to where they lie, or streamed into files beside the graph.

A traced graph names its parameters and holds none of them. Here each name finds its tensor on disk; a parameter
without a tensor is an error, and which tensors were used is kept, so that one that no graph reads is an error too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....guard.base.errors import InputError
from ...checkpoint.edits import row_blocks
from ...checkpoint.headers import DTYPES, Checkpoint
from ...checkpoint.layout import Layout
from .layout import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 64 * 2**20
"""A graph with no more weights than this holds them itself; one with more has them in files of its own."""

FILE_BYTES = 2**31 - 2**16
"""A browser holds no file larger than this in one piece."""

ALIGNMENT = 64
MODEL = "model."
"""Where the traced modules, or what they are made of, keep the model."""


@dataclass
class Binder:
    """Gives traced graphs the weights of `checkpoint`. used: names on disk of the tensors that some graph reads."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.disk = Layout(self.model, self.checkpoint.shapes).plain_names
        for name, of in self.model.all_tied_weights_keys.items():
            if name not in self.disk and of in self.disk:
                self.disk[name] = self.disk[of]

    def share(self, graph: ir.Model, precision: Precision) -> None:
        """Every weight of `graph` becomes a pointer into the checkpoint's own files, cast in the graph if need be."""
        import onnx_ir as ir

        for weight in self._weights(graph):
            shard, info = self.checkpoint.tensors[weight.disk]
            dtype = _onnx_dtype(DTYPES[info.dtype])
            place = (shard.path.name, shard.data_start + info.begin, info.end - info.begin)
            shape = ir.Shape(info.shape)
            weight.value.const_value = ir.ExternalTensor(*place, dtype, shape=shape, name=weight.value.name)
            _cast(graph, weight.value, dtype, _onnx_dtype(precision.compute))

    def copy(self, graph: ir.Model, precision: Precision, path: Path) -> int:
        """Returns every weight of `graph` is copied, transposed where the graph would transpose it. Returns the files
        written.

        They are named `path` + _data, then _data_1 and so on; none if the graph is small enough to hold its weights.
        """
        import onnx_ir as ir

        weights = list(self._weights(graph))
        for weight in weights:
            weight.transposed = _without_transposes(graph, weight.value)
            _cast(graph, weight.value, _onnx_dtype(precision.stored), _onnx_dtype(precision.compute))
        size = precision.stored.itemsize
        if sum(weight.entries for weight in weights) * size <= INLINE_BYTES:
            for weight in weights:
                array = np.empty(weight.entries * size, dtype=np.uint8)
                self._fill(array, weight, precision.stored)
                weight.value.const_value = ir.Tensor(
                    array.view(_onnx_dtype(precision.stored).numpy()).reshape(weight.stored_shape),
                    name=weight.value.name,
                )
            return 0
        number, end = 0, 0
        for weight in weights:
            length = weight.entries * size
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            if begin + length > FILE_BYTES and end:
                number, begin = number + 1, 0
            end = begin + length
            file = path.with_name(f"{path.name}_data{f'_{number}' if number else ''}")
            with file.open("ab") as stream:
                stream.truncate(end)
            array = np.memmap(file, np.uint8, "r+", begin, (length,)) if length else np.empty(0, np.uint8)
            self._fill(array, weight, precision.stored)
            weight.value.const_value = ir.ExternalTensor(
                file.name,
                begin,
                length,
                _onnx_dtype(precision.stored),
                shape=ir.Shape(weight.stored_shape),
                name=weight.value.name,
            )
        return number + 1

    def check_all_used(self, unread: tuple[str, ...]) -> None:
        """Raises InputError naming a tensor that transformers loads and no graph reads, `unread` prefixes in memory
        aside.
        """
        for memory, disk in self.disk.items():
            if disk not in self.used and not memory.startswith(unread):
                raise InputError(f"{self.checkpoint.folder}: tensor {disk!r} is in none of the graphs; not exported")

    def _weights(self, graph: ir.Model) -> Iterator[_Weight]:
        for name, value in list(graph.graph.initializers.items()):
            if value.const_value is not None:
                continue
            memory = name.partition(MODEL)[2]
            disk = self.disk.get(memory)
            if disk is None:
                raise InputError(f"{self.checkpoint.folder}: no tensor for {memory or name}")
            shape = self.checkpoint.info(disk).shape
            if value.shape is None or tuple(value.shape) != shape:
                raise InputError(
                    f"{self.checkpoint.folder}: tensor {disk!r} is {list(shape)}, the graph's {value.shape}"
                )
            self.used.add(disk)
            yield _Weight(value, disk, shape)

    def _fill(self, array: np.ndarray, weight: _Weight, dtype: torch.dtype) -> None:
        """Writes the tensor's bytes, rounded to `dtype`, block by block into `array`, bytes of the right number."""
        into = torch.from_numpy(array).view(dtype).view(weight.stored_shape)
        info = self.checkpoint.info(weight.disk)
        for first, last in row_blocks(info.shape) or [(0, 1)]:
            block = self.checkpoint.read(weight.disk, first, last).to(dtype)
            if not torch.isfinite(block).all():
                raise InputError(f"{self.checkpoint.folder}: tensor {weight.disk!r} has NaN or Inf as {dtype}")
            _rows(into, weight, first, last).copy_(block)


@dataclass
class _Weight:
    value: Any
    disk: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def entries(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def _rows(into: Tensor, weight: _Weight, first: int, last: int) -> Tensor:
    """Where rows first:last of the tensor on disk go."""
    if not weight.shape:
        return into
    return into[:, first:last].T if weight.transposed else into[first:last]


def _onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    import onnx_ir as ir

    names = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16", torch.float64: "DOUBLE"}
    return ir.DataType[names[dtype]]


def _without_transposes(graph: ir.Model, value: ir.Value) -> bool:
    """Tells whether all that `graph` does with the matrix `value` is to transpose it; it then does so no more."""
    import onnx_ir as ir

    uses = value.consumers()
    if not uses or not all(node.op_type == "Transpose" and _swaps(node) for node in uses):
        return False
    assert value.shape is not None
    value.shape = ir.Shape(list(value.shape)[::-1])
    for node in uses:
        node.outputs[0].replace_all_uses_with(value)
        graph.graph.remove(node, safe=True)
    return True


def _swaps(node: ir.Node) -> bool:
    return list(node.attributes["perm"].as_ints()) == [1, 0]


def _cast(graph: ir.Model, value: ir.Value, stored: ir.DataType, computed: ir.DataType) -> None:
    """Marks `value` as `stored`, and puts a Cast between it and what reads it where that is not `computed`."""
    import onnx_ir as ir

    value.dtype = stored
    if stored == computed:
        return
    uses = list(value.uses())
    cast = ir.node("Cast", [value], {"to": int(computed)})
    cast.outputs[0].name = f"{value.name}.cast"
    cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, computed
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph.graph.insert_before(uses[0].node, cast)
