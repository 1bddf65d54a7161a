"""Step 3.7."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.models.step3p7 import Step3p7Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import marks, noise, one, several, text_only, text_settings, vision_settings


def step3p7(knobs: Knobs) -> Step3p7Config:
    """Sliding attention with more heads than full attention, a dense layer and then experts with a shared one."""
    more = {
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)],
        "mlp_layer_types": ["dense", *["sparse"] * (knobs.layers - 1)],
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "share_expert_dim": 16,
        "sliding_window": 5,
        "num_sliding_attention_heads": 2 * knobs.heads,
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
    }
    return Step3p7Config(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=32, mlp_ratio=1.5),
        projector_bias=knobs.bias,
        **marks(knobs.tied),
    )


def step3p7_inputs(config: Step3p7Config) -> Mapping[str, Inputs]:
    """Four tokens for a picture, one for each smaller tile of it."""
    pixels, tiles = noise(3, 3, 32, 32), noise(3, 3, 16, 16)
    cut = {"pixel_values_local": tiles, "num_local_patches": torch.tensor([2, 0, 1])}
    return {
        "text": text_only(),
        "image": one(4) | {"pixel_values": pixels[:1]},
        "images": several([6, 4, 5]) | {"pixel_values": pixels, **cut},
    }


STEP = [
    Specimen("step3p7", step3p7, step3p7_inputs),
]
