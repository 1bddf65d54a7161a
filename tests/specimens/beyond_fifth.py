"""Models that read pictures as codes, ShieldGemma 2, the Qwen thinkers, Qwen 4, Inkling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import ChameleonConfig, Emu3Config, ShieldGemma2Config
from transformers.models.inkling import InklingConfig
from transformers.models.inkling2 import Inkling2Config
from transformers.models.qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen4_exp import Qwen4ExpConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    AUDIO,
    IMAGE,
    PATCH,
    START,
    gridded,
    half_rope,
    marks,
    noise,
    one,
    plain,
    prompts,
    rope,
    several,
    text_only,
    text_settings,
    vision_settings,
    words,
)

FIRST_CODE, CODES, END_OF_LINE = 50, 8, 49
AUDIO_START, AUDIO_END = 56, 57


def chameleon(knobs: Knobs, swin_norm: bool = False) -> ChameleonConfig:
    """A picture is sixteen codes of the vocabulary.  swin_norm: norms on outputs of sublayers, none on inputs."""
    names = {f"IMGIMG{chr(ord('A') + code)}Z": FIRST_CODE + code for code in range(CODES)}
    quantizer = {
        "embed_dim": 6,
        "num_embeddings": CODES,
        "latent_channels": 6,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    return ChameleonConfig(
        **text_settings(knobs, attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vq_config=quantizer,
        vocabulary_map={"<image>": IMAGE, **names},
        swin_norm=swin_norm,
    )


def chameleon_inputs(config: ChameleonConfig) -> Mapping[str, Inputs]:
    """Four pixels a side for each code."""
    return plain(16, 16)


def emu3(knobs: Knobs) -> Emu3Config:
    """A picture is codes of the vocabulary, each row with an end of line."""
    names = {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODES)}
    quantizer = {
        "codebook_size": CODES,
        "embed_dim": 6,
        "latent_channels": 6,
        "temporal_downsample_factor": 2,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "hidden_size": 32,
    }
    return Emu3Config(
        text_config=text_settings(knobs, attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vq_config=quantizer,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": END_OF_LINE, **names},
        tie_word_embeddings=knobs.tied,
    )


def emu3_inputs(config: Emu3Config) -> Mapping[str, Inputs]:
    """Four pixels a side for each code, pictures padded to the largest."""
    sizes = torch.tensor([[16, 16], [8, 16], [16, 8]])
    pixels = noise(3, 3, 16, 16)
    return {
        "text": text_only(),
        "image": one(20) | {"pixel_values": pixels[:1], "image_sizes": sizes[:1]},
        "images": several([20, 10, 12]) | {"pixel_values": pixels, "image_sizes": sizes},
    }


def shieldgemma2(knobs: Knobs) -> ShieldGemma2Config:
    """Gemma 3 under another name."""
    more = {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "layer_types": ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)],
        "sliding_window": 5,
        "attention_bias": knobs.bias,
        "query_pre_attn_scalar": 8,
    }
    return ShieldGemma2Config(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16, vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=START + 1,
        image_token_index=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def shieldgemma2_inputs(config: ShieldGemma2Config) -> Mapping[str, Inputs]:
    """Four tokens a picture, told apart by type."""
    return {
        name: given | {"token_type_ids": (given["input_ids"] == IMAGE).long()} for name, given in plain(4, 16).items()
    }


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


FIFTH = [
    Specimen("chameleon", chameleon, chameleon_inputs),
    Specimen("chameleon+swin_norm", partial(chameleon, swin_norm=True), chameleon_inputs),
    Specimen("emu3", emu3, emu3_inputs),
    Specimen("shieldgemma2", shieldgemma2, shieldgemma2_inputs),
    Specimen("qwen2_5_omni_thinker", qwen2_5_omni_thinker, thinker_inputs),
    Specimen("qwen3_omni_moe_thinker", qwen3_omni_moe_thinker, thinker_inputs),
    Specimen("qwen4_exp", qwen4_exp, qwen4_exp_inputs),
    Specimen("qwen4_exp+no_ngrams", partial(qwen4_exp, ngrams=False), qwen4_exp_inputs),
    Specimen("inkling2", inkling2, inkling2_inputs),
    Specimen("inkling_mm_model", inkling, inkling_inputs),
]
