"""Inkling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.inkling import InklingConfig
from transformers.models.inkling2 import Inkling2Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    AUDIO,
    AUDIO_START,
    IMAGE,
    PATCH,
    START,
    noise,
    one,
    several,
    text_only,
    text_settings,
    vision_settings,
)


def inkling_text(knobs: Knobs, layers: int, **more: Any) -> dict[str, Any]:
    """Sliding attention with heads of its own and full attention, relative positions, short convolutions."""
    return text_settings(knobs) | {
        "num_hidden_layers": layers,
        "layer_types": ["hybrid" if layer % 2 else "hybrid_sliding" for layer in range(layers)],
        "unpadded_vocab_size": 62,
        "head_dim": 8,
        "swa_num_attention_heads": knobs.heads,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 6,
        "sliding_window_size": 5,
        "d_rel": 4,
        "rel_extent": 8,
        "conv_kernel_size": 3,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "route_scale": 2.0,
        "tie_word_embeddings": False,
        **more,
    }


def inkling2(knobs: Knobs) -> Inkling2Config:
    """Layers read a weighted mean over blocks of layers; never tied: embeddings are normed."""
    text = inkling_text(knobs, max(knobs.layers, 5), n_layers_per_attn_res_block=2)
    del text["intermediate_size"]
    vision = vision_settings(
        posemb_grid_size=4, projection_hidden_dim=20, projector_bias=knobs.bias, text_hidden_size=knobs.width
    )
    return Inkling2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)


def inkling2_inputs(config: Inkling2Config) -> Mapping[str, Inputs]:
    """A token is a square of 2 x 2 patches."""

    def squares(grids: Sequence[Sequence[int]], seed: int) -> Inputs:
        sizes = torch.tensor(grids)
        side = 2 * PATCH
        return {"pixel_values": noise(int(sizes.prod(1).sum()), side, side, 3, seed=seed), "image_grid_thw": sizes}

    return {
        "text": text_only(),
        "image": one(6) | squares([[1, 2, 3]], 1),
        "images": several([4, 3, 3]) | squares([[1, 2, 2], [1, 1, 3], [1, 3, 1]], 2),
    }


def inkling(knobs: Knobs) -> InklingConfig:
    """A dense layer and then experts with shared ones; embeddings, pictures and sounds are normed; never tied."""
    more = {
        "mlp_layer_types": ["dense", *["sparse"] * (knobs.layers - 1)],
        "n_shared_experts": 2,
        "logits_mup_width_multiplier": 2.0,
    }
    return InklingConfig(
        text_config=inkling_text(knobs, knobs.layers, **more),
        vision_config={"patch_size": PATCH, "temporal_patch_size": 2, "n_layers": 4, "hidden_size": 16},
        audio_config={"n_mel_bins": 3, "mel_vocab_size": 5},
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_bos_token_id=START,
        audio_bos_token_id=AUDIO_START,
    )


def inkling_inputs(config: InklingConfig) -> Mapping[str, Inputs]:
    """A token is a patch of two frames, or a column of codes of sound."""
    codes = torch.arange(12).view(1, 4, 3) % 5
    return {
        "text": text_only(),
        "image": one(6) | {"pixel_values": noise(6, 2, PATCH, PATCH, 3)},
        "images": several([4, 6, 2]) | {"pixel_values": noise(12, 2, PATCH, PATCH, 3)},
        "audio": one(4, AUDIO) | {"audio_input_ids": codes},
    }


INKLING = [
    Specimen("inkling2", inkling2, inkling2_inputs),
    Specimen("inkling_mm_model", inkling, inkling_inputs),
]
