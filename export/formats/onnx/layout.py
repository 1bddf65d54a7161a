"""What the files are called, and in which number formats they come: the names that transformers.js resolves."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import torch

from ....guard.base.errors import InputError

VISION, EMBED, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION, EMBED, DECODER)
MERGED = "embedding"
"""A fourth graph, for onnxruntime-genai: the embedding table that puts the pictures in their places itself."""

FOLDER = "onnx"
"""Where the graphs lie; beside the weights themselves where they share them, for a graph finds no data elsewhere."""

Weights = Literal["copy", "shared"]
ONNX_WEIGHTS: tuple[Weights, ...] = get_args(Weights)


Provider = Literal["auto", "cpu", "cuda"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)


@dataclass(frozen=True)
class Precision:
    """One number format: what the graph computes in, what its weights are stored as, and how true it must stay.

    tolerance: largest |logit - torch's| / scale, torch computing in float32 with weights rounded to `stored`; inf where
    only behaviour can tell.  exact: whether greedy tokens must be torch's as well.
    bits: of weights quantised in blocks; None where they are stored as they are.  provider: where alone it runs.
    aliases: further suffixes under which clients look for the same file.
    """

    name: str
    suffix: str
    compute: torch.dtype
    stored: torch.dtype
    tolerance: float
    exact: bool = False
    bits: int | None = None
    provider: str | None = None
    aliases: tuple[str, ...] = ()


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "", torch.float32, torch.float32, 3e-5, exact=True),
        Precision("fp16", "_fp16", torch.float16, torch.float16, 2e-2),
        Precision("bf16", "_bf16", torch.float32, torch.bfloat16, 3e-5, exact=True),
        Precision("bf16-native", "_bf16_native", torch.bfloat16, torch.bfloat16, 1e-1, provider="cuda"),
        Precision("q8", "_q8", torch.float32, torch.float32, inf, bits=8, aliases=("_quantized",)),
        Precision("q4", "_q4", torch.float32, torch.float32, inf, bits=4),
    )
}


def precisions(text: str) -> tuple[Precision, ...]:
    """Returns the formats that `text` names, separated by commas; InputError for one that is not known or named
    twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"--onnx-dtype {name!r}: one of {', '.join(PRECISIONS)}, separated by commas")
    if len(set(names)) != len(names):
        raise InputError(f"--onnx-dtype {text}: names one twice")
    return tuple(PRECISIONS[name] for name in names)


def graph_file(graph: str, precision: Precision) -> str:
    """Returns the name of one graph's file."""
    return f"{graph}{precision.suffix}.onnx"
