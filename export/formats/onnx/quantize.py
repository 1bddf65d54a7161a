"""Weight-only quantisation in blocks, by onnxruntime's own quantizer: MatMul by constants, nothing else."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ....guard.base.errors import InputError
from .layout import Precision
from .weights import FILE_BYTES, INLINE_BYTES

BLOCK = 32
"""Weights that share a scale: what clients in browsers have the fastest kernels for."""


def quantize(source: Path, target: Path, precision: Precision) -> int:
    """Writes the float32 graph `source` as `target` with weights of `precision`.bits. Returns the data files written.

    Holds the graph and its weights in memory. The same file appears under the suffixes that clients look for.
    """
    try:
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    except ImportError as error:
        raise InputError(
            f"--onnx-dtype {precision.name}: needs the package {error.name}; pip install 'guardfold[onnx,cpu]'"
        ) from error
    assert precision.bits
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), precision.bits, BLOCK, is_symmetric=True)
    quantizer.process()
    model = quantizer.model.model
    size = sum(len(initializer.raw_data) for initializer in model.graph.initializer)
    if size > FILE_BYTES:
        raise InputError(f"{target.name}: {size >> 20} MB of quantised weights do not fit into one file; use fp16")
    external = size > INLINE_BYTES
    onnx.save(model, target, save_as_external_data=external, location=f"{target.name}_data")
    return int(external)


def link_aliases(target: Path, precision: Precision) -> None:
    """Gives the file `target`, which holds its weights itself, its other names; as links, so that no byte is twice."""
    for alias in precision.aliases:
        os.link(target, target.with_name(target.name.removesuffix(f"{precision.suffix}.onnx") + f"{alias}.onnx"))
