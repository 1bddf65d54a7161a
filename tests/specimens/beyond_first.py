"""Granite 4 Vision, LFM, Kimi, ERNIE, Cohere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from transformers import (
    Cohere2VisionConfig,
    CohereCompassConfig,
    Ernie4_5_VLMoeConfig,
    Granite4VisionConfig,
    Lfm2VlConfig,
    Lfm3VlConfig,
)
from transformers.models.kimi_k25 import Kimi_K25Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    IMAGE,
    PATCH,
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


def granite4_vision(knobs: Knobs) -> Granite4VisionConfig:
    """Six decoder layers: one takes a vision layer's features, four the spatial groups, one nothing."""
    layers = max(knobs.layers, 6)
    multipliers = {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    }
    biases = {"attention_bias": knobs.bias, "mlp_bias": knobs.bias}
    return Granite4VisionConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **multipliers, **biases),
        vision_config=vision_settings(hidden_size=64, image_size=16),
        qformer_config={"intermediate_size": 24, "num_hidden_layers": 1, "cross_attention_frequency": 1},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 0]],
        spatial_target_layers=[1, 2, 3, 4],
        projector_dropout=0.0,
        tie_word_embeddings=knobs.tied,
    )


def granite4_vision_inputs(config: Granite4VisionConfig) -> Mapping[str, Inputs]:
    """Base picture 2 x 2; tiles 2 x 4, 4 x 2 or 4 x 4, each row with a newline."""
    wide, tall, square = 4 + 2 * 5, 4 + 4 * 3, 4 + 4 * 5
    sizes = torch.tensor([[16, 32], [32, 16], [32, 32]])
    return {
        "text": text_only(),
        "image": one(wide) | {"pixel_values": noise(1, 3, 3, 16, 16), "image_sizes": sizes[:1]},
        "images": several([wide, tall, square]) | {"pixel_values": noise(3, 5, 3, 16, 16), "image_sizes": sizes},
    }


def lfm2_vl(knobs: Knobs) -> Lfm2VlConfig:
    """Convolution and attention layers in turn."""
    kinds = ["conv" if layer % 2 == 0 else "full_attention" for layer in range(knobs.layers)]
    more = {"conv_bias": knobs.bias, "layer_types": kinds, "block_auto_adjust_ff_dim": False}
    return Lfm2VlConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(num_patches=16, vision_use_head=False),
        image_token_id=IMAGE,
        projector_hidden_size=20,
        projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


def lfm2_vl_inputs(config: Lfm2VlConfig) -> Mapping[str, Inputs]:
    """Pictures of 4 x 4, 2 x 6 and 6 x 2 patches, padded to sixteen."""

    def padded(shapes: list[list[int]]) -> Inputs:
        counts = torch.tensor(shapes).prod(1)
        mask = (torch.arange(16) < counts[:, None]).long()
        pixels = noise(len(shapes), 16, 3 * PATCH**2) * mask[..., None]
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": mask}

    return {
        "text": text_only(),
        "image": one(3) | padded([[2, 6]]),
        "images": several([4, 3, 3]) | padded([[4, 4], [2, 6], [6, 2]]),
    }


def lfm3_vl(knobs: Knobs, post_norms: bool = True) -> Lfm3VlConfig:
    """Convolution, sliding and full attention layers; as published, with norms on their outputs too."""
    layers = max(knobs.layers, 3)
    kinds = ["conv", "full_attention", "sliding_attention"]
    more = {
        "layer_types": [kinds[layer % 3] for layer in range(layers)],
        "head_dim": 8,
        "conv_bias": knobs.bias,
        "conv_L_cache": 3,
        "sliding_window": 5,
        "attention_bias": knobs.bias,
        "use_sandwich_norm": post_norms,
    }
    vision = vision_settings(
        num_key_value_heads=1, layer_types=["conv", "full_attention"], temporal_patch_size=1, num_attention_heads=2
    )
    return Lfm3VlConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision,
        projector_hidden_size=20,
        projector_bias=knobs.bias,
        **marks(knobs.tied),
    )


def lfm3_vl_inputs(config: Lfm3VlConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids."""
    return gridded((3 * PATCH**2,))


def kimi_k25(knobs: Knobs) -> Kimi_K25Config:
    """DeepSeek V3 underneath: a dense layer, then experts with a shared one."""
    more = latent_attention(knobs) | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "attention_bias": knobs.bias,
    }
    return Kimi_K25Config(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(pos_emb_height=4, pos_emb_width=4, pos_emb_time=4),
        projection_hidden_size=16,
        **marks(knobs.tied),
    )


def kimi_k25_inputs(config: Kimi_K25Config) -> Mapping[str, Inputs]:
    """Square patches with grids; a video of one frame, as this release fails on any of more."""
    return gridded((3, PATCH, PATCH), frames=1)


def ernie4_5_vl_moe(knobs: Knobs) -> Ernie4_5_VLMoeConfig:
    """A dense layer, then experts of text and experts of vision beside shared ones."""
    half = knobs.width // knobs.heads // 2
    more = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, half - 2]},
        "moe_intermediate_size": [12, 8],
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 2,
        "use_bias": knobs.bias,
    }
    return Ernie4_5_VLMoeConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(),
        **marks(knobs.tied),
    )


def ernie4_5_vl_moe_inputs(config: Ernie4_5_VLMoeConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids; two frames of a video make one."""
    modalities = gridded((3 * PATCH**2,), tokens=lambda t, h, w: (t + 1) // 2 * h * w // 4, with_kinds=True)
    return {
        name: given | {"moe_mm_token_type_ids": (given["mm_token_type_ids"] > 0).long()}
        for name, given in modalities.items()
    }


def cohere2_vision(knobs: Knobs) -> Cohere2VisionConfig:
    """Cohere 2: attention and MLP side by side on one norm, sliding and full attention."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)]
    more = {"layer_types": kinds, "sliding_window": 5, "attention_bias": knobs.bias, "logit_scale": 0.5}
    return Cohere2VisionConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16, vision_use_head=False),
        image_token_id=IMAGE,
        alignment_intermediate_size=24,
        tie_word_embeddings=knobs.tied,
    )


def cohere2_vision_inputs(config: Cohere2VisionConfig) -> Mapping[str, Inputs]:
    """Tiles of 4 x 4 patches, four of which make a token."""
    return plain(4, 16)


def cohere_compass(knobs: Knobs) -> CohereCompassConfig:
    """Cohere's parallel layers with deepstack features added after the first two."""
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(knobs.layers)]
    more = {
        "layer_types": kinds,
        "sliding_window": 5,
        "attention_bias": knobs.bias,
        "logit_scale": 0.5,
        "rope_parameters": {"sliding_attention": rope(knobs), "full_attention": rope(knobs, 5000.0)},
    }
    vision = vision_settings(
        out_hidden_size=knobs.width,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
        temporal_patch_size=2,
    )
    return CohereCompassConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        **marks(knobs.tied),
    )


def cohere_compass_inputs(config: CohereCompassConfig) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids."""
    return gridded((3 * 2 * PATCH**2,), with_kinds=True, apart=True)


FIRST = [
    Specimen("granite4_vision", granite4_vision, granite4_vision_inputs),
    Specimen("lfm2_vl", lfm2_vl, lfm2_vl_inputs),
    Specimen("lfm3_vl", lfm3_vl, lfm3_vl_inputs),
    Specimen("lfm3_vl+prenorm", partial(lfm3_vl, post_norms=False), lfm3_vl_inputs),
    Specimen("kimi_k25", kimi_k25, kimi_k25_inputs),
    Specimen("ernie4_5_vl_moe", ernie4_5_vl_moe, ernie4_5_vl_moe_inputs),
    Specimen("cohere2_vision", cohere2_vision, cohere2_vision_inputs),
    Specimen("cohere_compass", cohere_compass, cohere_compass_inputs),
]
