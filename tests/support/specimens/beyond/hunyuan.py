"""HunYuan."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import HunYuanVLConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, PATCH, gridded, rope, text_settings, vision_settings


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


HUNYUAN = [
    Specimen("hunyuan_vl", hunyuan_vl, hunyuan_vl_inputs),
]
