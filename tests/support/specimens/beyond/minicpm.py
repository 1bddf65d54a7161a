"""MiniCPM-V."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    END,
    PATCH,
    START,
    VIDEO,
    half_rope,
    kinds,
    marks,
    noise,
    one,
    several,
    text_only,
    text_settings,
    vision_settings,
)


def qwen3_5_text(knobs: Knobs) -> dict[str, Any]:
    """Linear attention and full attention in turn."""
    more = {
        "model_type": "qwen3_5_text",
        "layer_types": ["full_attention" if layer % 2 else "linear_attention" for layer in range(knobs.layers)],
        "head_dim": 16,
        "attention_bias": knobs.bias,
        "rope_parameters": half_rope(),
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return text_settings(knobs, **more)


def minicpm(knobs: Knobs, model_type: str) -> Any:
    """Qwen 3.5 behind a tower that merges patches once, or twice, on their way."""
    slices = {"image_start_id": START, "image_end_id": END, "slice_start_id": 55, "slice_end_id": 56, "newline_id": 57}
    return AutoConfig.for_model(
        model_type,
        text_config=qwen3_5_text(knobs),
        vision_config=vision_settings(image_size=16),
        insert_layer_id=0,
        **slices if model_type == "minicpmv4_7" else {},
        **marks(knobs.tied),
    )


def minicpm_inputs(config: Any) -> Mapping[str, Inputs]:
    """Patches of all pictures in one long row; a token is 4 x 4 patches, or 2 x 2 without the tower's own merging."""
    area = 4 if config.downsample_mode == "4x" else 16

    def row(sizes: list[list[int]], suffix: str = "", seed: int = 7) -> Inputs:
        grids = torch.tensor(sizes)
        pixels = noise(1, 3, PATCH, PATCH * int(grids.prod(1).sum()), seed=seed)
        return {f"pixel_values{suffix}": pixels, f"target_sizes{suffix}": grids}

    def counts(sizes: list[list[int]]) -> list[int]:
        return [height * width // area for height, width in sizes]

    single, many, film = [[4, 8]], [[4, 4], [8, 4], [4, 12]], [[4, 4], [4, 4], [4, 4]]
    modalities = {
        "text": text_only(),
        "image": one(counts(single)[0]) | row(single),
        "images": several(counts(many)) | row(many, seed=8),
        "video": several(counts(film), VIDEO) | row(film, "_videos", seed=9),
    }
    if config.model_type != "minicpmv4_7":
        return modalities
    return {name: given | {"mm_token_type_ids": kinds(given)} for name, given in modalities.items()}


MINICPM = [
    Specimen("minicpmv4_6", partial(minicpm, model_type="minicpmv4_6"), minicpm_inputs),
    Specimen("minicpmv4_7", partial(minicpm, model_type="minicpmv4_7"), minicpm_inputs),
    Specimen("minicpm_ocr", partial(minicpm, model_type="minicpm_ocr"), minicpm_inputs),
]
