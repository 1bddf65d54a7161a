"""Kimi K2.5."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.models.kimi_k25 import Kimi_K25Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import PATCH, gridded, latent_attention, marks, text_settings, vision_settings


def kimi_k25(knobs: Knobs) -> Kimi_K25Config:
    """DeepSeek V3 underneath: a dense layer, then experts with a shared one."""
    more = latent_attention(knobs) | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "attention_bias": knobs.bias,
    }
    return Kimi_K25Config(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(pos_emb_height=4, pos_emb_width=4, pos_emb_time=4),
        projection_hidden_size=16,
        **marks(knobs.tied),
    )


def kimi_k25_inputs(config: Kimi_K25Config) -> Mapping[str, Inputs]:
    """Square patches with grids; a video of one frame, as this release fails on any of more."""
    return gridded((3, PATCH, PATCH), frames=1)


KIMI = [
    Specimen("kimi_k25", kimi_k25, kimi_k25_inputs),
]
