"""GLM 4.6V and kin, GLM-OCR, GLM 5."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import AutoConfig, Glm5NextConfig, Glm46VConfig, GlmOcrConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    END,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    gridded,
    latent_attention,
    marks,
    rope,
    text_settings,
    vision_settings,
)

VIDEO_END = 57


VIDEO_START = 56


def glm_vision(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """The tower of the GLM family."""
    return vision_settings(
        out_hidden_size=knobs.width, image_size=16, temporal_patch_size=2, attention_bias=knobs.bias, **more
    )


def glm46v(knobs: Knobs, model_type: str = "glm46v") -> Any:
    """The dense GLM, with norms on the outputs of its sublayers too."""
    return AutoConfig.for_model(
        model_type,
        text_config=text_settings(knobs, model_type="glm4v_text", rope_parameters=rope(knobs)),
        vision_config=glm_vision(knobs),
        **marks(knobs.tied),
    )


def glm46v_moe(knobs: Knobs) -> Glm46VConfig:
    """The GLM with experts: a dense layer first, norms on the inputs only."""
    quarter = knobs.width // knobs.heads // 4
    sections = [quarter - quarter // 3 * 2, quarter // 3, quarter // 3]
    more = {
        "model_type": "glm4v_moe_text",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": sections,
        },
        "attention_bias": knobs.bias,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
    }
    return Glm46VConfig(
        text_config=text_settings(knobs, **more),
        vision_config=glm_vision(knobs, model_type="glm4v_moe_vision"),
        **marks(knobs.tied),
    )


def glm_ocr(knobs: Knobs) -> GlmOcrConfig:
    """GLM's dense layers under a smaller tower."""
    return GlmOcrConfig(
        text_config=text_settings(knobs, rope_parameters=rope(knobs)),
        vision_config=glm_vision(knobs),
        **marks(knobs.tied),
    )


def glm_inputs(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids; the frames of a video stand apart, written with the token of pictures."""
    modalities = gridded((3 * 2 * PATCH**2,), with_kinds=config.model_type != "glm5_next", apart=True)
    video = modalities["video"]
    written = {VIDEO: IMAGE, START: VIDEO_START, END: VIDEO_END}
    ids = video["input_ids"].clone().apply_(lambda token: written.get(token, token))
    return {**modalities, "video": video | {"input_ids": ids}}


def glm5_next(knobs: Knobs) -> Glm5NextConfig:
    """Linear and indexed attention, dense and sparse layers, two residual streams mixed anew by every sublayer."""
    layers = max(knobs.layers, 3)
    more = latent_attention(knobs) | {
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", *["indexed_attention"] * (layers - 1)],
        "indexer_types": ["full", *["shared" if layer % 2 else "full" for layer in range(layers - 1)]],
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": knobs.bias,
        "index_topk": 4,
        "index_kpool": 2,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 2,
        "linear_conv_kernel_dim": 3,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    }
    return Glm5NextConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=glm_vision(knobs, projection_intermediate_size=20),
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        **marks(knobs.tied),
    )


GLM = [
    Specimen("glm46v", glm46v, glm_inputs),
    Specimen("glm46v+glm4v_moe_text", glm46v_moe, glm_inputs),
    Specimen("glmga", partial(glm46v, model_type="glmga"), glm_inputs),
    Specimen("glm_ocr", glm_ocr, glm_inputs),
    Specimen("glm5_next", glm5_next, glm_inputs),
]
