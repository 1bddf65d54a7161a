"""Muse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import MuseGlimmerConfig, MuseSparkConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import AUDIO, PATCH, gridded, marks, noise, one, text_settings, vision_settings


def muse_vision() -> dict[str, Any]:
    """The tower of the Muse family: windows, then everything."""
    return vision_settings(
        pos_emb_height=4,
        pos_emb_width=4,
        max_position_embeddings=16,
        patch_temporal=2,
        layer_types=["window_attention", "full_attention"],
    )


def muse_text(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """Sliding attention with positions and full attention without them."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)]
    return text_settings(knobs) | {
        "layer_types": kinds,
        "layer_rope_theta": [0 if kind == "full_attention" else 10000.0 for kind in kinds],
        "sliding_window": 5,
        "head_dim": 8,
        "attention_bias": knobs.bias,
        **more,
    }


def muse_glimmer(knobs: Knobs) -> MuseGlimmerConfig:
    """Norms on embeddings, on pictures, and on the outputs of sublayers."""
    return MuseGlimmerConfig(
        text_config=muse_text(knobs),
        vision_config=muse_vision(),
        out_hidden_size=64,
        projector_hidden_size=20,
        **marks(knobs.tied),
    )


def muse_spark(knobs: Knobs) -> MuseSparkConfig:
    """The same with experts behind projections, gates on the residual, and sound; never tied."""
    more = {
        "tie_word_embeddings": False,
        "mlp_layer_types": ["dense", *["sparse"] * (knobs.layers - 1)],
        "moe_intermediate_size": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_hidden_size": 20,
    }
    audio = {
        "patch_sizes": [4, 2],
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "num_hidden_layers": 2,
        "mlp_ratio": 2.0,
        "conv_kernel_size": 3,
        "out_hidden_size": knobs.width,
    }
    return MuseSparkConfig(
        text_config=muse_text(knobs, **more),
        vision_config=muse_vision(),
        audio_config=audio,
        out_hidden_size=64,
        projector_hidden_size=20,
        audio_token_id=AUDIO,
        **marks(False),
    )


def muse_inputs(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids; eight samples of sound make a token."""
    modalities = gridded((3 * 2 * PATCH**2,))
    if config.model_type == "muse_glimmer":
        return modalities
    return {**modalities, "audio": one(3, AUDIO) | {"input_values": noise(1, 24)}}


MUSE = [
    Specimen("muse_glimmer", muse_glimmer, muse_inputs),
    Specimen("muse_spark", muse_spark, muse_inputs),
]
