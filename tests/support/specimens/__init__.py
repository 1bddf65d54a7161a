"""Tiny random models of every vision-language family: configs, and inputs for each modality, without processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Knobs:
    """What varies from one tiny model of a family to the next, where the family has it; two layers at least."""

    width: int = 32
    heads: int = 4
    kv_heads: int = 2
    layers: int = 3
    tied: bool = False
    bias: bool = True


@dataclass(frozen=True)
class Specimen:
    """One family with one text model.

    name: outer model type, "+" and the text model's type where several are possible.  config: a tiny config.
    inputs: modality ("text", "image", "images", "video", ...) -> keyword arguments of the model's forward.
    """

    name: str
    config: Callable[[Knobs], Any]
    inputs: Callable[[Any], Mapping[str, Inputs]]


def build(specimen: Specimen, knobs: Knobs = Knobs(), seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The model, attention and experts eager, each parameter drawn at random: gains about 1, biases and gates not 0.

    By AutoModelForImageTextToText, and by AutoModelForCausalLM what it does not know: Phi-4 multimodal.
    A float64 model is to be run in specimens.exact.exact(), else padded rows become nan.
    """
    torch.manual_seed(seed)
    config = specimen.config(knobs)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    known = type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if known else AutoModelForCausalLM
    model = auto.from_config(config, **eager).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if parameter.ndim <= 1 else 1.5 / parameter.shape[-1] ** 0.5))
    return model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
