"""EXAONE 4.5."""

from __future__ import annotations

from transformers import Exaone4_5_Config

from specimens import Knobs, Specimen
from specimens.beyond.parts import marks, text_settings, two_frame_patches, vision_settings


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


EXAONE = [
    Specimen("exaone4_5", exaone4_5, two_frame_patches),
]
