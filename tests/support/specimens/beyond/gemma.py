"""ShieldGemma 2, Gemma 4 unified, DiffusionGemma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ShieldGemma2Config
from transformers.models.diffusion_gemma import DiffusionGemmaConfig
from transformers.models.gemma4_unified import Gemma4UnifiedConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    AUDIO,
    END,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    kinds,
    marks,
    noise,
    one,
    places,
    plain,
    several,
    text_only,
    text_settings,
    vision_settings,
    words,
)


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


def gemma_text(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """Sliding attention and, with larger heads, full attention; norms on outputs too."""
    last = knobs.layers - 1
    kinds_of = ["full_attention" if layer % 2 or layer == last else "sliding_attention" for layer in range(last + 1)]
    return text_settings(
        knobs,
        head_dim=8,
        global_head_dim=16,
        layer_types=kinds_of,
        sliding_window=5,
        attention_bias=knobs.bias,
        final_logit_softcapping=5.0,
        **more,
    )


def pictures(shapes: Sequence[tuple[int, int]], width: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Patches of pictures of several shapes and their places, padded with -1 to the largest."""
    most = max(rows * columns for rows, columns in shapes)
    where = torch.full((len(shapes), most, 2), -1)
    for index, (rows, columns) in enumerate(shapes):
        where[index, : rows * columns] = places(rows, columns)
    return noise(len(shapes), most, width, seed=seed), where


def gemma4_unified(knobs: Knobs) -> Gemma4UnifiedConfig:
    """No towers: patches and samples of sound are normed and projected."""
    vision = {
        "patch_size": PATCH,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 16,
        "mm_posemb_size": 8,
        "output_proj_dims": 16,
    }
    return Gemma4UnifiedConfig(
        text_config=gemma_text(knobs),
        vision_config=vision,
        audio_config={"audio_embed_dim": 12},
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def gemma4_unified_inputs(config: Gemma4UnifiedConfig) -> Mapping[str, Inputs]:
    """A token is a patch, or a piece of sound."""

    def seen(shapes: Sequence[tuple[int, int]], suffix: str = "", name: str = "image") -> Inputs:
        patches, where = pictures(shapes, 3 * (2 * PATCH) ** 2)
        return {f"pixel_values{suffix}": patches, f"{name}_position_ids": where}

    film = seen([(2, 2)] * 3, "_videos", "video") | {"num_frames_per_video": torch.tensor([3])}
    heard = {"input_features": noise(1, 3, 12), "input_features_mask": torch.ones(1, 3, dtype=torch.bool)}
    modalities = {
        "text": text_only(),
        "image": one(6) | seen([(2, 3)]),
        "images": several([4, 3, 6]) | seen([(2, 2), (1, 3), (3, 2)]),
        "video": one(12, VIDEO) | film,
        "audio": one(3, AUDIO) | heard,
    }
    return {name: given | {"mm_token_type_ids": kinds(given)} for name, given in modalities.items()}


def diffusion_gemma(knobs: Knobs) -> DiffusionGemmaConfig:
    """One stack of layers twice: it reads the prompt, then it fills a canvas; experts beside every MLP."""
    more = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}
    vision = vision_settings(
        model_type="gemma4_vision",
        num_key_value_heads=2,
        head_dim=8,
        pooling_kernel_size=2,
        position_embedding_size=12,
    )
    return DiffusionGemmaConfig(
        text_config=gemma_text(knobs, **more),
        vision_config=vision,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        canvas_length=4,
        tie_word_embeddings=knobs.tied,
    )


def diffusion_gemma_inputs(config: DiffusionGemmaConfig) -> Mapping[str, Inputs]:
    """A token is 2 x 2 patches; the canvas holds any words."""

    def seen(shapes: Sequence[tuple[int, int]]) -> Inputs:
        patches, where = pictures(shapes, 3 * PATCH**2)
        return {"pixel_values": patches, "image_position_ids": where}

    modalities = {
        "text": text_only(),
        "image": one(6) | seen([(4, 6)]),
        "images": several([6, 6, 6]) | seen([(4, 6), (6, 4), (2, 12)]),
    }
    return {
        name: given | {"decoder_input_ids": torch.tensor([words(4, 11), words(4, 12)])[: len(given["input_ids"])]}
        for name, given in modalities.items()
    }


GEMMA = [
    Specimen("shieldgemma2", shieldgemma2, shieldgemma2_inputs),
    Specimen("gemma4_unified", gemma4_unified, gemma4_unified_inputs),
    Specimen("diffusion_gemma", diffusion_gemma, diffusion_gemma_inputs),
]
