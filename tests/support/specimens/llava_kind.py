"""LLaVA and its relatives: a vision tower, a projector, and a text model that could be any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from specimens import Inputs, Knobs, Specimen
from specimens.parts import GRID, IMAGE, SIDE, VIDEO, language, noise, pictures, text, vision

PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
TALL, WIDE, SQUARE = (30, 12), (10, 31), (14, 15)
FRAMES = 3
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

FEW_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = {"shared_expert_intermediate_size": 24}
LINEAR_ATTENTION = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
OF_TEXT: dict[str, dict[str, Any]] = {
    "granite": {"embedding_multiplier": 1.5, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "qwen2_moe": {**FEW_EXPERTS, **SHARED_EXPERT},
    "qwen3_moe": FEW_EXPERTS,
    "qwen3_next": {**FEW_EXPERTS, **SHARED_EXPERT, **LINEAR_ATTENTION},
    "stablelm": {"partial_rotary_factor": 0.5},
}


def llava(outer: str, kind: str, tower: str, more: Mapping[str, Any], knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        outer,
        text_config=language(kind, knobs, **OF_TEXT.get(kind, {})),
        vision_config=vision(tower, **({"vision_use_head": False} if tower == SIGLIP else {})),
        image_token_index=IMAGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
        **more,
    )


def untied(kind: str, knobs: Knobs) -> Any:
    """LLaVA with a decoder whose embedding it cannot tie: see UNBUILDABLE."""
    return llava("llava", kind, CLIP, FEATURES, replace(knobs, tied=False))


def tied(knobs: Knobs) -> Any:
    return llava("llava", "opt", CLIP, FEATURES, replace(knobs, tied=True))


def square(config: Any) -> dict[str, Inputs]:
    """Pictures of one size, as many tokens as patches."""
    return {
        "text": text(),
        "image": pictures(GRID**2) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": pictures(*[GRID**2] * 3) | {"pixel_values": noise(3, 3, SIDE, SIDE, seed=1)},
    }


def square_or_video(config: Any) -> dict[str, Inputs]:
    clip = pictures(FRAMES * (GRID**2 + 1), token=VIDEO)
    return square(config) | {"video": clip | {"pixel_values_videos": noise(1, FRAMES, 3, SIDE, SIDE, seed=2)}}


def tiles(size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = get_anyres_image_grid_shape(size, PINPOINTS, SIDE)
    return rows, columns


def anyres_tokens(size: tuple[int, int]) -> int:
    """The whole picture, then the tiles without their padding and a newline after each row."""
    rows, columns = tiles(size)
    _, height, width = unpad_image(torch.empty(1, rows * GRID, columns * GRID), size).shape
    return GRID**2 + height * (width + 1)


def anyres_pixels(*sizes: tuple[int, int], seed: int) -> Inputs:
    counts = [1 + rows * columns for rows, columns in map(tiles, sizes)]
    pixels = noise(len(sizes), max(counts), 3, SIDE, SIDE, seed=seed)
    for picture, count in zip(pixels, counts, strict=True):
        picture[count:] = 0
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def anyres(config: Any) -> dict[str, Inputs]:
    three = (WIDE, SQUARE, TALL)
    return {
        "text": text(),
        "image": pictures(anyres_tokens(TALL)) | anyres_pixels(TALL, seed=0),
        "images": pictures(*map(anyres_tokens, three)) | anyres_pixels(*three, seed=1),
    }


def video_pixels(count: int) -> Inputs:
    return pictures(count, token=VIDEO) | {"pixel_values_videos": noise(1, FRAMES, 3, SIDE, SIDE, seed=2)}


def next_video(config: Any) -> dict[str, Inputs]:
    return anyres(config) | {"video": video_pixels(FRAMES * (GRID // 2) ** 2)}


def onevision(config: Any) -> dict[str, Inputs]:
    """Beside anyres pictures: several pictures of one sample, a newline after each; a video, a newline at the end."""
    several = {
        "pixel_values": noise(3, 1, 3, SIDE, SIDE, seed=3),
        "image_sizes": torch.tensor([TALL, WIDE, TALL]),
        "batch_num_images": torch.tensor([3]),
    }
    one_row = pictures(3 * (GRID**2 + 1))
    return anyres(config) | {"sample": one_row | several, "video": video_pixels(FRAMES * (GRID // 2) ** 2 + 1)}


FEATURES = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
ANYRES = {"image_grid_pinpoints": PINPOINTS}
VIDEO_TOKEN = {"video_token_index": VIDEO}
FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}

TIED_OPT = Specimen("llava+opt, tied", tied, square)
LLAVA_KIND = [
    *[
        Specimen(f"llava+{kind}", partial(llava, "llava", kind, CLIP, FEATURES), square)
        for kind in ("llama", "mistral", "qwen2", "phi", "olmo2", "gemma")
    ],
    Specimen("llava+opt", partial(untied, "opt"), square),
    Specimen("vipllava", partial(llava, "vipllava", "llama", CLIP, {"vision_feature_layer": [-1, -2]}), square),
    Specimen("video_llava", partial(llava, "video_llava", "llama", CLIP, FEATURES | VIDEO_TOKEN), square_or_video),
    *[
        Specimen(f"llava_next+{kind}", partial(llava, "llava_next", kind, CLIP, FEATURES | ANYRES), anyres)
        for kind in ("llama", "mistral", "granite")
    ],
    Specimen(
        "llava_next_video",
        partial(llava, "llava_next_video", "llama", CLIP, FEATURES | ANYRES | VIDEO_TOKEN),
        next_video,
    ),
    Specimen(
        "llava_onevision",
        partial(llava, "llava_onevision", "qwen2", SIGLIP, FULL | ANYRES | VIDEO_TOKEN),
        onevision,
    ),
]
