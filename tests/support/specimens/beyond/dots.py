"""dots 3."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers.models.dots3_note import Dots3NoteConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    AUDIO,
    PATCH,
    gridded,
    latent_attention,
    marks,
    noise,
    one,
    text_settings,
    vision_settings,
)


def dots3_note(knobs: Knobs) -> Dots3NoteConfig:
    """Low-rank attention, indexed and sliding, a dense layer and then experts; the tower has experts too."""
    sliding = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "head_dim": 10,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
    }
    more = latent_attention(knobs) | {
        "head_dim": 8,
        "layer_types": ["sliding_attention" if layer % 2 else "indexed_attention" for layer in range(knobs.layers)],
        "sliding_window": 5,
        "mlp_layer_types": ["dense", *["sparse"] * (knobs.layers - 1)],
        "moe_intermediate_size": 12,
        "shared_experts_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": knobs.bias,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        **{f"swa_{name}": value for name, value in sliding.items()},
    }
    vision = vision_settings(
        mlp_layer_types=["dense", "sparse"],
        moe_intermediate_size=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        adapter_in_dim=16,
        adapter_out_dim=knobs.width,
    )
    audio = {
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "feature_size": 16,
        "hop_length": 10,
        "downsample_hidden_size": 4,
        "adapter_input_size": 12,
        "adapter_out_dim": knobs.width,
    }
    return Dots3NoteConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        audio_config=audio,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def dots3_note_inputs(config: Dots3NoteConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids; eight frames of sound make a token."""
    heard = {"input_features": noise(1, 16, 24), "chunk_sample_lengths": torch.tensor([240])}
    return {**gridded((3 * PATCH**2,)), "audio": one(3, AUDIO) | heard}


DOTS = [
    Specimen("dots3_note", dots3_note, dots3_note_inputs),
]
