"""Mistral 4, alone and below Mistral 3's outer class, Mistral Large 4."""

from __future__ import annotations

from typing import Any

from transformers import Mistral3Config, Mistral4Config, MistralLarge4Config

from specimens import Knobs, Specimen
from specimens.beyond.parts import (
    IMAGE,
    PIXTRAL,
    latent_attention,
    pixtral_inputs,
    text_only,
    text_settings,
    vision_settings,
)


def mistral4_text(knobs: Knobs) -> dict[str, Any]:
    """Low-rank attention, a dense layer and then experts with a shared one."""
    more = latent_attention(knobs) | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "attention_bias": knobs.bias,
    }
    return text_settings(knobs, **more)


def mistral4(knobs: Knobs) -> Mistral4Config:
    """The class that is listed under this name takes no pictures."""
    return Mistral4Config(**mistral4_text(knobs))


def mistral3_mistral4(knobs: Knobs) -> Mistral3Config:
    """Mistral 4 where pictures reach it."""
    return Mistral3Config(
        text_config={"model_type": "mistral4", **mistral4_text(knobs)},
        vision_config=vision_settings(**PIXTRAL),
        image_token_index=IMAGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


def mistral_large4(knobs: Knobs) -> MistralLarge4Config:
    """Indexed attention whose keys and values later layers may share, a cap on the logits."""
    layers = max(knobs.layers, 4)
    more = latent_attention(knobs) | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": knobs.bias,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "indexer_types": ["full", "full", *["shared"] * (layers - 2)],
        "no_rope_layers": [1, *[0] * (layers - 1)],
        "kv_source_layers": [0, 1, *[1] * (layers - 2)],
    }
    del more["q_lora_rank"]
    return MistralLarge4Config(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision_settings(**PIXTRAL),
        image_token_index=IMAGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


MISTRAL = [
    Specimen("mistral4", mistral4, lambda config: {"text": text_only()}),
    Specimen("mistral3+mistral4", mistral3_mistral4, pixtral_inputs),
    Specimen("mistral_large4", mistral_large4, pixtral_inputs),
]
