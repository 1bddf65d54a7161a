"""Muse, Nemotron, VideoLLaMA 3, Step, and DeepSeek's OCR models and kin."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import (
    DeepseekOcr2Config,
    DeepseekVLHybridConfig,
    MuseGlimmerConfig,
    MuseSparkConfig,
    VideoLlama3Config,
)
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3_Config
from transformers.models.step3p7 import Step3p7Config
from transformers.models.unlimited_ocr import UnlimitedOcrConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    AUDIO,
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

SAM: dict[str, Any] = {
    "hidden_size": 16,
    "output_channels": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": PATCH,
    "mlp_dim": 24,
    "window_size": 3,
    "global_attn_indexes": [1],
}


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


def nemotron_h_omni(knobs: Knobs, latent: int | None = None) -> NemotronH_Omni_Reasoning_V3_Config:
    """One sublayer a layer: Mamba, experts, attention, MLP.

    latent: the width the experts work in, if not the model's own.
    """
    more = {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 8,
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "use_bias": knobs.bias,
        "mamba_proj_bias": knobs.bias,
        "ssm_state_size": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": latent,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 1.5,
        "patch_size": PATCH,
        "image_size": 16,
        "max_img_size": 16,
        "num_cls_tokens": 1,
        "num_registers": 2,
        "summary_idxs": [0],
        "video_temporal_patch_size": 2,
    }
    audio = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_kernel_size": 3,
        "subsampling_conv_channels": 4,
        "num_mel_bins": 16,
        "projection_hidden_size": 20,
        "projection_bias": knobs.bias,
    }
    text = text_settings(knobs, **more)
    del text["num_hidden_layers"]
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        projector_hidden_size=20,
        vision_hidden_size=16,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def nemotron_h_omni_inputs(config: NemotronH_Omni_Reasoning_V3_Config) -> Mapping[str, Inputs]:
    """Flat patches with grids; eight frames of sound make a token.  No video: this release fails on any."""

    def patches(grids: list[list[int]], seed: int) -> Inputs:
        sizes = torch.tensor(grids)
        return {"pixel_values": noise(int(sizes.prod(1).sum()), 3 * PATCH**2, seed=seed), "image_grid_hw": sizes}

    return {
        "text": text_only(),
        "image": one(6) | patches([[4, 6]], 1),
        "images": several([4, 3, 3]) | patches([[4, 4], [2, 6], [6, 2]], 2),
        "audio": one(3, AUDIO) | {"input_features": noise(1, 24, 16)},
    }


def video_llama_3(knobs: Knobs) -> VideoLlama3Config:
    """Qwen 2; pictures of any size are shrunk by interpolation."""
    return VideoLlama3Config(
        text_config=text_settings(knobs, model_type="qwen2"),
        vision_config=vision_settings(),
        **marks(knobs.tied),
    )


def video_llama_3_inputs(config: VideoLlama3Config) -> Mapping[str, Inputs]:
    """Flat patches with grids, and by how much each picture is to be shrunk."""
    modalities = gridded((3 * PATCH**2,))
    return {
        name: given
        | {key.replace("grid_thw", "merge_sizes"): grid[:, 0] * 0 + 2 for key, grid in given.items() if "grid" in key}
        for name, given in modalities.items()
    }


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


def deepseek_text(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """A dense layer and then experts with shared ones."""
    return text_settings(
        knobs,
        attention_bias=knobs.bias,
        mlp_bias=knobs.bias,
        mlp_layer_types=["dense", *["sparse"] * (knobs.layers - 1)],
        n_routed_experts=4,
        n_shared_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_group=1,
        topk_group=1,
        **more,
    )


def deepseek_ocr2(knobs: Knobs) -> DeepseekOcr2Config:
    """A tower of queries behind SAM, and a vector between the views of a picture."""
    encoder = {
        "hidden_size": 20,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return DeepseekOcr2Config(
        text_config=deepseek_text(knobs),
        vision_config={"sam_config": SAM | {"downsample_channels": [14, 20]}, "encoder_config": encoder},
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def deepseek_ocr2_inputs(config: DeepseekOcr2Config) -> Mapping[str, Inputs]:
    """As many tokens as the tower has queries for each view, and one for the separator."""
    view = 144
    pixels, tiles = noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=8)
    cut = {"pixel_values_local": tiles, "num_local_patches": torch.tensor([0, 2])}
    return {
        "text": text_only(),
        "image": one(view + 1) | {"pixel_values": pixels[:1]},
        "images": several([view + 1, 3 * view + 1]) | {"pixel_values": pixels, **cut},
    }


def deepseek_vl_hybrid(knobs: Knobs) -> DeepseekVLHybridConfig:
    """Llama; each token of a picture is two halves from two towers, then projected."""
    return DeepseekVLHybridConfig(
        text_config=text_settings(knobs, model_type="llama", attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vision_config=vision_settings(image_size=16, vision_use_head=False),
        high_res_vision_config=SAM,
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def deepseek_vl_hybrid_inputs(config: DeepseekVLHybridConfig) -> Mapping[str, Inputs]:
    """A token for each patch."""

    def both(count: int) -> Inputs:
        return {"pixel_values": noise(count, 3, 16, 16), "high_res_pixel_values": noise(count, 3, 32, 32, seed=8)}

    return {"text": text_only(), "image": one(16) | both(1), "images": several([16, 16, 16]) | both(3)}


def unlimited_ocr(knobs: Knobs) -> UnlimitedOcrConfig:
    """CLIP behind SAM, both of them projected; newlines and a separator."""
    encoder = vision_settings(hidden_size=20, image_size=16)
    return UnlimitedOcrConfig(
        text_config=deepseek_text(knobs, sliding_window=5) | {"num_key_value_heads": knobs.heads},
        vision_config={"sam_config": SAM | {"downsample_channels": [14, 20]}, "encoder_config": encoder},
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def unlimited_ocr_inputs(config: UnlimitedOcrConfig) -> Mapping[str, Inputs]:
    """Views of 2 x 2 tokens; every row has a newline, every picture a separator."""
    whole, wide, tall = 2 * 3, 2 * 5, 4 * 3
    pixels, tiles = noise(3, 3, 32, 32), noise(4, 3, 32, 32, seed=8)
    cut: dict[str, Any] = {
        "pixel_values_local": tiles,
        "num_local_patches": [2, 0, 2],
        "patches_grid": torch.tensor([[2, 1], [1, 1], [1, 2]]),
    }
    return {
        "text": text_only(),
        "image": one(whole + 1) | {"pixel_values": pixels[:1]},
        "images": several([wide + whole + 1, whole + 1, tall + whole + 1]) | {"pixel_values": pixels, **cut},
    }


FOURTH = [
    Specimen("muse_glimmer", muse_glimmer, muse_inputs),
    Specimen("muse_spark", muse_spark, muse_inputs),
    Specimen("nemotron_h_omni", nemotron_h_omni, nemotron_h_omni_inputs),
    Specimen("nemotron_h_omni+latent", partial(nemotron_h_omni, latent=20), nemotron_h_omni_inputs),
    Specimen("video_llama_3", video_llama_3, video_llama_3_inputs),
    Specimen("step3p7", step3p7, step3p7_inputs),
    Specimen("deepseek_ocr2", deepseek_ocr2, deepseek_ocr2_inputs),
    Specimen("deepseek_vl_hybrid", deepseek_vl_hybrid, deepseek_vl_hybrid_inputs),
    Specimen("unlimited_ocr", unlimited_ocr, unlimited_ocr_inputs),
]
