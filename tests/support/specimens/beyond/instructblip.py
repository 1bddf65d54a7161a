"""InstructBLIP for video, around OPT and around LLaMA."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import InstructBlipVideoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import (
    VIDEO,
    VOCABULARY,
    noise,
    one,
    several,
    text_only,
    text_settings,
    vision_settings,
    words,
)


def instructblipvideo(knobs: Knobs, text: str = "opt") -> InstructBlipVideoConfig:
    """OPT, or Llama, behind a Q-Former that sees each frame."""
    more: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 40, "enable_bias": knobs.bias, "word_embed_proj_dim": knobs.width},
        "llama": {"attention_bias": knobs.bias, "mlp_bias": knobs.bias},
    }
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
    }
    return InstructBlipVideoConfig(
        text_config=text_settings(knobs, model_type=text, **more[text]),
        vision_config=vision_settings(image_size=16),
        qformer_config=qformer,
        num_query_tokens=3,
        video_token_index=VIDEO,
    )


def instructblipvideo_inputs(config: InstructBlipVideoConfig) -> Mapping[str, Inputs]:
    """Three queries for each of two frames.  The class wants a video with every prompt; the first does not name it."""

    def film(count: int) -> Inputs:
        asked = torch.tensor([words(5, 21 + index) for index in range(count)])
        return {"pixel_values": noise(count, 2, 3, 16, 16), "qformer_input_ids": asked}

    return {
        "text": text_only() | film(2),
        "video": one(6, VIDEO) | film(1),
        "videos": several([6, 6, 6], VIDEO) | film(3),
    }


INSTRUCTBLIP = [
    Specimen("instructblipvideo", instructblipvideo, instructblipvideo_inputs),
    Specimen("instructblipvideo+llama", partial(instructblipvideo, text="llama"), instructblipvideo_inputs),
]
