"""ERNIE 4.5."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import Ernie4_5_VLMoeConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import PATCH, gridded, marks, text_settings, vision_settings


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


ERNIE = [
    Specimen("ernie4_5_vl_moe", ernie4_5_vl_moe, ernie4_5_vl_moe_inputs),
]
