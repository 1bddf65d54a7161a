"""HyperCLOVA X, with norms after its layers and without."""

from __future__ import annotations

from functools import partial

from transformers import HyperCLOVAXVisionV2Config

from specimens import Knobs, Specimen
from specimens.beyond.parts import marks, text_settings, two_frame_patches, vision_settings


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


HYPERCLOVAX = [
    Specimen("hyperclovax_vision_v2", hyperclovax_vision_v2, two_frame_patches),
    Specimen("hyperclovax_vision_v2+prenorm", partial(hyperclovax_vision_v2, post_norms=False), two_frame_patches),
]
