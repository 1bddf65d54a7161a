"""PerceptionLM, FastVLM: their vision tower is timm's."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import FastVlmConfig, PerceptionLMConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    IMAGE,
    VIDEO,
    marks,
    noise,
    one,
    plain,
    several,
    text_only,
    text_settings,
    vision_settings,
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


TIMM_TOWERS = [
    Specimen("perception_lm", perception_lm, perception_lm_inputs),
    Specimen("fast_vlm", fast_vlm, fast_vlm_inputs),
]
