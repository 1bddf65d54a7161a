"""Readers of pages: GOT-OCR 2, LightOnOCR, PaddleOCR, Qianfan-OCR."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import AutoConfig, GotOcr2Config, LightOnOcrConfig, PaddleOCRVLConfig, QianfanOCRConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    IMAGE,
    PATCH,
    PIXTRAL,
    gridded,
    marks,
    pixtral_inputs,
    plain,
    rope,
    text_settings,
    vision_settings,
)


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


def lighton_ocr(knobs: Knobs) -> LightOnOcrConfig:
    """Qwen 3 behind Pixtral."""
    more = {"model_type": "qwen3", "head_dim": 8, "attention_bias": knobs.bias}
    return LightOnOcrConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(**PIXTRAL),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def paddleocr_vl(knobs: Knobs) -> PaddleOCRVLConfig:
    """ERNIE's dense decoder with positions on three axes."""
    more = {"rope_parameters": rope(knobs), "use_bias": knobs.bias, "head_dim": knobs.width // knobs.heads}
    return PaddleOCRVLConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16),
        **marks(knobs.tied),
    )


def paddleocr_vl_inputs(config: PaddleOCRVLConfig) -> Mapping[str, Inputs]:
    """Square patches with grids."""
    return gridded((3, PATCH, PATCH), frames=0, with_kinds=True)


def qianfan_ocr(knobs: Knobs) -> QianfanOCRConfig:
    """Qwen 3 behind InternVL's tower."""
    more = {"model_type": "qwen3", "head_dim": 8, "attention_bias": knobs.bias}
    return QianfanOCRConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision_settings(image_size=16, drop_path_rate=0.0),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def tiles_inputs(config: Any) -> Mapping[str, Inputs]:
    """Tiles of 4 x 4 patches, four of which make a token."""
    return plain(4, 16)


OCR = [
    Specimen("got_ocr2", got_ocr2, got_ocr2_inputs),
    Specimen("pp_chart2table", partial(got_ocr2, model_type="pp_chart2table"), got_ocr2_inputs),
    Specimen("lighton_ocr", lighton_ocr, pixtral_inputs),
    Specimen("paddleocr_vl", paddleocr_vl, paddleocr_vl_inputs),
    Specimen("qianfan_ocr", qianfan_ocr, tiles_inputs),
]
