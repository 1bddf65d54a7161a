"""Granite 4 Vision, Granite Docling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import Granite4VisionConfig
from transformers.models.granite_docling import GraniteDoclingConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, noise, one, several, text_only, text_settings, vision_settings


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


GRANITE = [
    Specimen("granite4_vision", granite4_vision, granite4_vision_inputs),
    Specimen("granite_docling", granite_docling, granite_docling_inputs),
]
