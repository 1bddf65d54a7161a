"""The thinkers of Qwen 2.5 Omni and Qwen 3 Omni, Qwen 4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers.models.qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen4_exp import Qwen4ExpConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    PATCH,
    START,
    gridded,
    half_rope,
    marks,
    noise,
    prompts,
    rope,
    text_settings,
    vision_settings,
    words,
)


def omni(knobs: Knobs) -> dict[str, Any]:
    """What marks sounds and pictures for the thinkers."""
    return {
        "audio_token_id": AUDIO,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
        "vision_start_token_id": START,
        "vision_end_token_id": START + 1,
        "user_token_id": 3,
        **marks(knobs.tied),
    }


def omni_audio(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """A tower for sounds, of two layers."""
    return {
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "d_model": 12,
        "max_source_positions": 40,
        "output_dim": knobs.width,
        **more,
    }


def sounds(modalities: Mapping[str, Inputs], frames: int, tokens: int) -> Mapping[str, Inputs]:
    """The modalities and a sound of so many frames that stands for so many tokens."""
    row = [*words(3), AUDIO_START, *[AUDIO] * tokens, AUDIO_END, *words(4, 1)]
    heard = {"input_features": noise(1, 8, frames), "feature_attention_mask": torch.ones(1, frames, dtype=torch.long)}
    return {**modalities, "audio": prompts(row) | heard}


def qwen2_5_omni_thinker(knobs: Knobs) -> Qwen2_5OmniThinkerConfig:
    """Qwen 2.5 VL with ears."""
    vision = vision_settings(
        out_hidden_size=knobs.width, temporal_patch_size=2, window_size=8, fullatt_block_indexes=[1]
    )
    return Qwen2_5OmniThinkerConfig(
        text_config=text_settings(knobs, rope_parameters=rope(knobs)),
        vision_config=vision,
        audio_config=omni_audio(knobs, n_window=4),
        **omni(knobs),
    )


def qwen3_omni_moe_thinker(knobs: Knobs) -> Qwen3OmniMoeThinkerConfig:
    """Qwen 3 VL with experts and ears: a dense layer between sparse ones, deepstack features after the first two."""
    more = {
        "rope_parameters": rope(knobs),
        "attention_bias": knobs.bias,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "mlp_only_layers": [1],
    }
    vision = vision_settings(
        out_hidden_size=knobs.width,
        temporal_patch_size=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return Qwen3OmniMoeThinkerConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        audio_config=omni_audio(knobs, n_window=50, n_window_infer=100, downsample_hidden_size=4),
        **omni(knobs),
    )


def thinker_inputs(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids, and a sound."""
    modalities = dict(gridded((3 * 2 * PATCH**2,)))
    modalities["video"] = modalities["video"] | {"video_second_per_grid": torch.ones(1)}
    frames, tokens = (16, 4) if config.model_type == "qwen2_5_omni_thinker" else (24, 3)
    return sounds(modalities, frames, tokens)


def qwen4_exp(knobs: Knobs, ngrams: bool = True) -> Qwen4ExpConfig:
    """Linear and indexed attention, experts everywhere, two residual streams.

    ngrams: whether embeddings of n-grams, past a convolution, write into the first layer.
    """
    layers = max(knobs.layers, 3)
    more = {
        "layer_types": ["indexed_attention" if layer % 2 else "linear_attention" for layer in range(layers)],
        "head_dim": 16,
        "attention_bias": knobs.bias,
        "rope_parameters": half_rope(),
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "hc_count": 2,
        "hc_lowrank": 6,
        "ple_layer_ids": [1] if ngrams else [],
        "ple_embed_dim": 20,
        "ple_conv_kernel_size": 2,
        "ngram_size": 3,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 16,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    }
    vision = vision_settings(out_hidden_size=knobs.width, temporal_patch_size=2, num_position_embeddings=16)
    return Qwen4ExpConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision,
        **marks(knobs.tied),
    )


def qwen4_exp_inputs(config: Qwen4ExpConfig) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids; the frames of a video stand apart."""
    return gridded((3 * 2 * PATCH**2,), with_kinds=True, apart=True)


QWEN = [
    Specimen("qwen2_5_omni_thinker", qwen2_5_omni_thinker, thinker_inputs),
    Specimen("qwen3_omni_moe_thinker", qwen3_omni_moe_thinker, thinker_inputs),
    Specimen("qwen4_exp", qwen4_exp, qwen4_exp_inputs),
    Specimen("qwen4_exp+no_ngrams", partial(qwen4_exp, ngrams=False), qwen4_exp_inputs),
]
