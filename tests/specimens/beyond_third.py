"""OCR models, MiniCPM, MiniMax, Mistral."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LightOnOcrConfig,
    MiniMaxM3VLConfig,
    Mistral3Config,
    Mistral4Config,
    MistralLarge4Config,
    PaddleOCRVLConfig,
    QianfanOCRConfig,
)
from transformers.models.granite_docling import GraniteDoclingConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    END,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    gridded,
    half_rope,
    kinds,
    latent_attention,
    marks,
    noise,
    one,
    plain,
    rope,
    several,
    text_only,
    text_settings,
    vision_settings,
)

PIXTRAL: dict[str, Any] = {"model_type": "pixtral", "head_dim": 8, "image_size": 32}


def lighton_ocr(knobs: Knobs) -> LightOnOcrConfig:
    """Qwen 3 behind Pixtral."""
    more = {"model_type": "qwen3", "head_dim": 8, "attention_bias": knobs.bias}
    return LightOnOcrConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(**PIXTRAL),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def pixtral_inputs(config: Any) -> Mapping[str, Inputs]:
    """Pictures of several sizes, padded to the largest; eight pixels a side for each token."""
    sizes = torch.tensor([[16, 16], [8, 24], [24, 8]])
    pixels = noise(3, 3, 24, 24)
    return {
        "text": text_only(),
        "image": one(3) | {"pixel_values": pixels[:1, :, :8], "image_sizes": sizes[1:2]},
        "images": several([4, 3, 3]) | {"pixel_values": pixels, "image_sizes": sizes},
    }


def paddleocr_vl(knobs: Knobs) -> PaddleOCRVLConfig:
    """ERNIE's dense decoder with positions on three axes."""
    more = {"rope_parameters": rope(knobs), "use_bias": knobs.bias, "head_dim": knobs.width // knobs.heads}
    return PaddleOCRVLConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16),
        **marks(knobs.tied),
    )


def paddleocr_vl_inputs(config: PaddleOCRVLConfig) -> Mapping[str, Inputs]:
    """Square patches with grids."""
    return gridded((3, PATCH, PATCH), frames=0, with_kinds=True)


def qianfan_ocr(knobs: Knobs) -> QianfanOCRConfig:
    """Qwen 3 behind InternVL's tower."""
    more = {"model_type": "qwen3", "head_dim": 8, "attention_bias": knobs.bias}
    return QianfanOCRConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16, drop_path_rate=0.0),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def tiles_inputs(config: Any) -> Mapping[str, Inputs]:
    """Tiles of 4 x 4 patches, four of which make a token."""
    return plain(4, 16)


def granite_docling(knobs: Knobs) -> GraniteDoclingConfig:
    """Granite with deepstack features added after its first two layers; the picture ends in a norm."""
    more = {
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    }
    vision = vision_settings(
        image_size=32, out_hidden_size=knobs.width, scale_factor=4, deepstack_visual_indexes=[0, 1]
    )
    return GraniteDoclingConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        image_token_id=IMAGE,
        pad_token_id=0,
        tie_word_embeddings=knobs.tied,
    )


def granite_docling_inputs(config: GraniteDoclingConfig) -> Mapping[str, Inputs]:
    """Four tokens for each tile, sixteen on the fine route."""
    mask = torch.tensor([[True, False], [True, True]])
    single = {"pixel_values": noise(1, 1, 3, 32, 32), "pixel_attention_mask": mask[:1, :1]}
    return {
        "text": text_only(),
        "image": one(4) | single,
        "images": several([4, 4, 4]) | {"pixel_values": noise(2, 2, 3, 32, 32), "pixel_attention_mask": mask},
        "fine": one(16) | single | {"tile_fine_mask": mask[:1, :1]},
    }


def qwen3_5_text(knobs: Knobs) -> dict[str, Any]:
    """Linear attention and full attention in turn."""
    more = {
        "model_type": "qwen3_5_text",
        "layer_types": ["full_attention" if layer % 2 else "linear_attention" for layer in range(knobs.layers)],
        "head_dim": 16,
        "attention_bias": knobs.bias,
        "rope_parameters": half_rope(),
        "linear_conv_kernel_dim": 3,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    return text_settings(knobs, **more)


def minicpm(knobs: Knobs, model_type: str) -> Any:
    """Qwen 3.5 behind a tower that merges patches once, or twice, on their way."""
    slices = {"image_start_id": START, "image_end_id": END, "slice_start_id": 55, "slice_end_id": 56, "newline_id": 57}
    return AutoConfig.for_model(
        model_type,
        text_config=qwen3_5_text(knobs),
        vision_config=vision_settings(image_size=16),
        insert_layer_id=0,
        **slices if model_type == "minicpmv4_7" else {},
        **marks(knobs.tied),
    )


def minicpm_inputs(config: Any) -> Mapping[str, Inputs]:
    """Patches of all pictures in one long row; a token is 4 x 4 patches, or 2 x 2 without the tower's own merging."""
    area = 4 if config.downsample_mode == "4x" else 16

    def row(sizes: list[list[int]], suffix: str = "", seed: int = 7) -> Inputs:
        grids = torch.tensor(sizes)
        pixels = noise(1, 3, PATCH, PATCH * int(grids.prod(1).sum()), seed=seed)
        return {f"pixel_values{suffix}": pixels, f"target_sizes{suffix}": grids}

    def counts(sizes: list[list[int]]) -> list[int]:
        return [height * width // area for height, width in sizes]

    single, many, film = [[4, 8]], [[4, 4], [8, 4], [4, 12]], [[4, 4], [4, 4], [4, 4]]
    modalities = {
        "text": text_only(),
        "image": one(counts(single)[0]) | row(single),
        "images": several(counts(many)) | row(many, seed=8),
        "video": several(counts(film), VIDEO) | row(film, "_videos", seed=9),
    }
    if config.model_type != "minicpmv4_7":
        return modalities
    return {name: given | {"mm_token_type_ids": kinds(given)} for name, given in modalities.items()}


def minimax_m3_vl(knobs: Knobs) -> MiniMaxM3VLConfig:
    """Full attention and attention to chosen blocks, a dense layer and then experts with a shared one."""
    layers = max(knobs.layers, 3)
    more = {
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * (layers - 1)],
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
        "head_dim": 8,
        "rotary_dim": 4,
        "intermediate_size": 12,
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "index_n_heads": knobs.kv_heads,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 3,
    }
    return MiniMaxM3VLConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision_settings(temporal_patch_size=2, image_size=16, num_attention_heads=1),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=20,
        tie_word_embeddings=knobs.tied,
    )


def two_frame_patches(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids."""
    return gridded((3 * 2 * PATCH**2,))


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


THIRD = [
    Specimen("lighton_ocr", lighton_ocr, pixtral_inputs),
    Specimen("paddleocr_vl", paddleocr_vl, paddleocr_vl_inputs),
    Specimen("qianfan_ocr", qianfan_ocr, tiles_inputs),
    Specimen("granite_docling", granite_docling, granite_docling_inputs),
    Specimen("minicpmv4_6", partial(minicpm, model_type="minicpmv4_6"), minicpm_inputs),
    Specimen("minicpmv4_7", partial(minicpm, model_type="minicpmv4_7"), minicpm_inputs),
    Specimen("minicpm_ocr", partial(minicpm, model_type="minicpm_ocr"), minicpm_inputs),
    Specimen("minimax_m3_vl", minimax_m3_vl, two_frame_patches),
    Specimen("mistral4", mistral4, lambda config: {"text": text_only()}),
    Specimen("mistral3+mistral4", mistral3_mistral4, pixtral_inputs),
    Specimen("mistral_large4", mistral_large4, pixtral_inputs),
]
