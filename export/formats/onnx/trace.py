"""From a module to a graph without a weight in memory: traced on fake tensors, simplified without touching weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from ....guard.base.errors import InputError

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
MAX_FOLDED_ENTRIES = 2**16
Axes = Mapping[int, str]
"""Axis -> the name of its size, for the axes whose size is not fixed."""


@dataclass(frozen=True)
class Port:
    """An input: an example (distinct sizes, none 0 or 1), and its axes of unfixed size."""

    example: Tensor
    axes: Axes = field(default_factory=dict)


@dataclass(frozen=True)
class Sketch:
    """A module to be traced.

    inputs: argument of forward -> its port, or several under one argument (a list in forward).  names: of those
    inputs in the graph, flattened.  outputs: names of what forward returns.
    """

    module: nn.Module
    inputs: Mapping[str, Port | Sequence[Port]]
    names: Sequence[str]
    outputs: Sequence[str]


def need_onnx() -> None:
    """Raises InputError unless the packages that write graphs are installed."""
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--format onnx: needs the package {error.name}; pip install 'guardfold[onnx,cpu]' (or onnx,gpu)"
        ) from error


def faked(model: PreTrainedModel, dtype: torch.dtype) -> FakeTensorMode:
    """This changes `model`: its parameters (on meta, in memory or not) become fake ones of `dtype`, without storage."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        model.tie_weights()
    return mode


def trace_graph(sketch: Sketch, mode: FakeTensorMode) -> ir.Model:
    """Returns the graph of `sketch`. An initializer that stands for a parameter has the parameter's name and no
    value.
    """
    from onnxscript.optimizer import optimize_ir

    with mode:
        example = {
            name: _apply(port, lambda one: torch.empty_like(one.example)) for name, port in sketch.inputs.items()
        }
    with _quiet(), mode:
        program: Any = torch.onnx.export(
            sketch.module.eval(),
            kwargs=example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(sketch.names),
            output_names=list(sketch.outputs),
            dynamic_shapes={name: _apply(port, lambda one: dict(one.axes)) for name, port in sketch.inputs.items()},
            optimize=False,
            verbose=False,
        )
    model = program.model
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    with _quiet():
        optimize_ir(model, input_size_limit=MAX_FOLDED_ENTRIES, output_size_limit=MAX_FOLDED_ENTRIES)
    _forget_origin(model)
    return model


def _forget_origin(model: ir.Model) -> None:
    """Drops what the exporter notes of each node: stack traces with paths of this machine, larger than the graph."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()
        part.doc_string = None


def _apply(port: Port | Sequence[Port], make: Any) -> Any:
    return make(port) if isinstance(port, Port) else [make(one) for one in port]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed and of names that two axes share."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
