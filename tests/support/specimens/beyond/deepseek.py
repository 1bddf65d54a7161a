"""DeepSeek-OCR 2, DeepSeek-VL hybrid, Unlimited-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DeepseekOcr2Config, DeepseekVLHybridConfig
from transformers.models.unlimited_ocr import UnlimitedOcrConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, PATCH, noise, one, several, text_only, text_settings, vision_settings

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


DEEPSEEK = [
    Specimen("deepseek_ocr2", deepseek_ocr2, deepseek_ocr2_inputs),
    Specimen("deepseek_vl_hybrid", deepseek_vl_hybrid, deepseek_vl_hybrid_inputs),
    Specimen("unlimited_ocr", unlimited_ocr, unlimited_ocr_inputs),
]
