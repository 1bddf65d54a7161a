"""Cohere 2 Vision, Compass."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import Cohere2VisionConfig, CohereCompassConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, PATCH, gridded, marks, plain, rope, text_settings, vision_settings


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


COHERE = [
    Specimen("cohere2_vision", cohere2_vision, cohere2_vision_inputs),
    Specimen("cohere_compass", cohere_compass, cohere_compass_inputs),
]
