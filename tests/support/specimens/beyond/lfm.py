"""LFM 2 and 3."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from transformers import Lfm2VlConfig, Lfm3VlConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    IMAGE,
    PATCH,
    gridded,
    marks,
    noise,
    one,
    several,
    text_only,
    text_settings,
    vision_settings,
)


def lfm2_vl(knobs: Knobs) -> Lfm2VlConfig:
    """Convolution and attention layers in turn."""
    kinds = ["conv" if layer % 2 == 0 else "full_attention" for layer in range(knobs.layers)]
    more = {"conv_bias": knobs.bias, "layer_types": kinds, "block_auto_adjust_ff_dim": False}
    return Lfm2VlConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(num_patches=16, vision_use_head=False),
        image_token_id=IMAGE,
        projector_hidden_size=20,
        projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


def lfm2_vl_inputs(config: Lfm2VlConfig) -> Mapping[str, Inputs]:
    """Pictures of 4 x 4, 2 x 6 and 6 x 2 patches, padded to sixteen."""

    def padded(shapes: list[list[int]]) -> Inputs:
        counts = torch.tensor(shapes).prod(1)
        mask = (torch.arange(16) < counts[:, None]).long()
        pixels = noise(len(shapes), 16, 3 * PATCH**2) * mask[..., None]
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}

    return {
        "text": text_only(),
        "image": one(3) | padded([[2, 6]]),
        "images": several([4, 3, 3]) | padded([[4, 4], [2, 6], [6, 2]]),
    }


def lfm3_vl(knobs: Knobs, post_norms: bool = True) -> Lfm3VlConfig:
    """Convolution, sliding and full attention layers; as published, with norms on their outputs too."""
    layers = max(knobs.layers, 3)
    kinds = ["conv", "full_attention", "sliding_attention"]
    more = {
        "layer_types": [kinds[layer % 3] for layer in range(layers)],
        "head_dim": 8,
        "conv_bias": knobs.bias,
        "conv_L_cache": 3,
        "sliding_window": 5,
        "attention_bias": knobs.bias,
        "use_sandwich_norm": post_norms,
    }
    vision = vision_settings(
        num_key_value_heads=1, layer_types=["conv", "full_attention"], temporal_patch_size=1, num_attention_heads=2
    )
    return Lfm3VlConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision,
        projector_hidden_size=20,
        projector_bias=knobs.bias,
        **marks(knobs.tied),
    )


def lfm3_vl_inputs(config: Lfm3VlConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids."""
    return gridded((3 * PATCH**2,))


LFM = [
    Specimen("lfm2_vl", lfm2_vl, lfm2_vl_inputs),
    Specimen("lfm3_vl", lfm3_vl, lfm3_vl_inputs),
    Specimen("lfm3_vl+prenorm", partial(lfm3_vl, post_norms=False), lfm3_vl_inputs),
]
