"""Cosmos 3."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.models.cosmos3_edge import Cosmos3EdgeConfig
from transformers.models.cosmos3_omni import Cosmos3OmniConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import PATCH, gridded, marks, rope, text_settings, vision_settings


def cosmos3_edge(knobs: Knobs) -> Cosmos3EdgeConfig:
    """A dense decoder with an ungated MLP; never tied."""
    more = {
        "head_dim": knobs.width // knobs.heads,
        "rope_parameters": rope(knobs),
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "tie_word_embeddings": False,
    }
    return Cosmos3EdgeConfig(
        text_config=text_settings(knobs) | more,
        vision_config=vision_settings(num_patches=16),
        projector_hidden_size=20,
        **marks(False),
    )


def cosmos3_edge_inputs(config: Cosmos3EdgeConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids; the frames of a video stand apart."""
    return gridded((3 * PATCH**2,), with_kinds=True, apart=True)


def cosmos3_omni(knobs: Knobs) -> Cosmos3OmniConfig:
    """Qwen 3 VL, deepstack and all."""
    more = {
        "model_type": "qwen3_vl_text",
        "head_dim": knobs.width // knobs.heads,
        "rope_parameters": rope(knobs),
        "attention_bias": knobs.bias,
    }
    vision = vision_settings(
        model_type="qwen3_vl_vision",
        depth=2,
        num_heads=2,
        out_hidden_size=knobs.width,
        temporal_patch_size=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return Cosmos3OmniConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        **marks(knobs.tied),
    )


def cosmos3_omni_inputs(config: Cosmos3OmniConfig) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids; the frames of a video stand apart."""
    return gridded((3 * 2 * PATCH**2,), with_kinds=True, apart=True)


COSMOS = [
    Specimen("cosmos3_edge", cosmos3_edge, cosmos3_edge_inputs),
    Specimen("cosmos3_omni", cosmos3_omni, cosmos3_omni_inputs),
]
