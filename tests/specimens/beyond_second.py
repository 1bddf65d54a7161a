"""GLM, EXAONE, HunYuan, HyperCLOVA X, and the two that take their vision tower from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import (
    AutoConfig,
    Exaone4_5_Config,
    FastVlmConfig,
    Glm5NextConfig,
    Glm46VConfig,
    GlmOcrConfig,
    GotOcr2Config,
    HunYuanVLConfig,
    HyperCLOVAXVisionV2Config,
    PerceptionLMConfig,
)

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    END,
    IMAGE,
    PATCH,
    START,
    VIDEO,
    gridded,
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

VIDEO_START, VIDEO_END = 56, 57


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


def exaone4_5(knobs: Knobs) -> Exaone4_5_Config:
    """EXAONE 4: norms on the outputs of the sublayers and none on their inputs."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)]
    vision = vision_settings(
        out_hidden_size=knobs.width,
        temporal_patch_size=2,
        window_size=8,
        fullatt_block_indexes=[1],
        num_key_value_heads=1,
    )
    return Exaone4_5_Config(
        text_config=text_settings(knobs, model_type="exaone4", layer_types=kinds, sliding_window=5),
        vision_config=vision,
        **marks(knobs.tied),
    )


def two_frame_patches(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids."""
    return gridded((3 * 2 * PATCH**2,))


def hunyuan_vl(knobs: Knobs) -> HunYuanVLConfig:
    """A dense pre-norm decoder; the picture comes between two vectors of its own, through a norm."""
    more = {"rope_parameters": rope(knobs), "attention_bias": knobs.bias, "head_dim": knobs.width // knobs.heads}
    return HunYuanVLConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(max_image_size=16, img_max_token_num=16),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def hunyuan_vl_inputs(config: HunYuanVLConfig) -> Mapping[str, Inputs]:
    """Every row of merged patches has a newline, every picture a beginning and an end."""
    return gridded((3 * PATCH**2,), frames=0, tokens=lambda t, h, w: h // 2 * (w // 2 + 1) + 2, with_kinds=True)


def hyperclovax_vision_v2(knobs: Knobs, post_norms: bool = True) -> HyperCLOVAXVisionV2Config:
    """Qwen2.5's tower, a projector, and multipliers on residuals; as published, with norms on outputs too."""
    more = {
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "use_post_norm": post_norms,
    }
    vision = vision_settings(
        model_type="qwen2_5_vl_vision",
        depth=2,
        num_heads=2,
        out_hidden_size=20,
        temporal_patch_size=2,
        window_size=8,
        fullatt_block_indexes=[1],
    )
    return HyperCLOVAXVisionV2Config(
        text_config=text_settings(knobs, model_type="hyperclovax", **more),
        vision_config=vision,
        **marks(knobs.tied),
    )


def perception_lm(knobs: Knobs) -> PerceptionLMConfig:
    """Llama; CLIP stands in for the tower, which another package would have to bring."""
    return PerceptionLMConfig(
        text_config=text_settings(knobs, model_type="llama", attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vision_config=vision_settings(model_type="clip_vision_model", image_size=16, model_args={"embed_dim": 16}),
        projector_pooling_ratio=2,
        **marks(knobs.tied),
    )


def perception_lm_inputs(config: PerceptionLMConfig) -> Mapping[str, Inputs]:
    """Four tokens for each tile or frame."""
    return {
        "text": text_only(),
        "image": one(8) | {"pixel_values": noise(1, 2, 3, 16, 16)},
        "images": several([8, 8, 8]) | {"pixel_values": noise(3, 2, 3, 16, 16)},
        "video": one(12, VIDEO) | {"pixel_values_videos": noise(1, 3, 3, 16, 16)},
    }


def fast_vlm(knobs: Knobs) -> FastVlmConfig:
    """Qwen 2; ConvNeXt stands in for the tower, which another package would have to bring."""
    vision = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "hidden_size": 16}
    return FastVlmConfig(
        text_config=text_settings(knobs, model_type="qwen2"),
        vision_config=vision,
        image_token_index=IMAGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


def fast_vlm_inputs(config: FastVlmConfig) -> Mapping[str, Inputs]:
    """Eight pixels a side for each token."""
    return plain(4, 16)


def got_ocr2(knobs: Knobs, model_type: str = "got_ocr2") -> Any:
    """Qwen 2 behind SAM's tower and two convolutions; PP-Chart2Table is the same model."""
    vision = vision_settings(
        output_channels=12, image_size=32, window_size=3, global_attn_indexes=[1], mlp_dim=24, num_attention_heads=2
    )
    return AutoConfig.for_model(
        model_type,
        text_config=text_settings(knobs, model_type="qwen2"),
        vision_config=vision,
        image_token_index=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def got_ocr2_inputs(config: GotOcr2Config) -> Mapping[str, Inputs]:
    """Sixteen pixels a side for each token."""
    return plain(4, 32)


SECOND = [
    Specimen("glm46v", glm46v, glm_inputs),
    Specimen("glm46v+glm4v_moe_text", glm46v_moe, glm_inputs),
    Specimen("glmga", partial(glm46v, model_type="glmga"), glm_inputs),
    Specimen("glm_ocr", glm_ocr, glm_inputs),
    Specimen("glm5_next", glm5_next, glm_inputs),
    Specimen("exaone4_5", exaone4_5, two_frame_patches),
    Specimen("hunyuan_vl", hunyuan_vl, hunyuan_vl_inputs),
    Specimen("hyperclovax_vision_v2", hyperclovax_vision_v2, two_frame_patches),
    Specimen("hyperclovax_vision_v2+prenorm", partial(hyperclovax_vision_v2, post_norms=False), two_frame_patches),
    Specimen("perception_lm", perception_lm, perception_lm_inputs),
    Specimen("fast_vlm", fast_vlm, fast_vlm_inputs),
    Specimen("got_ocr2", got_ocr2, got_ocr2_inputs),
    Specimen("pp_chart2table", partial(got_ocr2, model_type="pp_chart2table"), got_ocr2_inputs),
]
