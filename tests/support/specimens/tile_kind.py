"""Families that cut pictures into tiles, or take them whole at their own size, and merge neighbouring patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import GRID, IMAGE, PAD, PATCH, SIDE, batch, language, noise, pictures, sentence, text, vision

MERGE = 2
LATENTS = 3
TILE = (GRID // MERGE) ** 2
TILES = [1, 3, 2]
TALL, WIDE, SMALL = (24, 8), (16, 24), (8, 16)


def idefics2(knobs: Knobs) -> Any:
    resampler = {"resampler_n_latents": LATENTS, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8}
    return AutoConfig.for_model(
        "idefics2",
        text_config=language("mistral", knobs),
        vision_config=vision("idefics2_vision"),
        perceiver_config={"hidden_size": knobs.width, "num_key_value_heads": 1, **resampler},
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def idefics3(kind: str, knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        kind,
        text_config=language("llama", knobs),
        vision_config=vision(f"{kind}_vision"),
        image_token_id=IMAGE,
        scale_factor=MERGE,
        pad_token_id=PAD,
        tie_word_embeddings=knobs.tied,
    )


def internvl(kind: str, knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "internvl",
        text_config=language(kind, knobs),
        vision_config=vision("internvl_vision", attention_bias=knobs.bias),
        image_token_id=IMAGE,
        image_seq_length=TILE,
        downsample_ratio=1 / MERGE,
        tie_word_embeddings=knobs.tied,
    )


def mistral3(knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "mistral3",
        text_config=language("mistral", knobs),
        vision_config=vision("pixtral") | {"image_size": 2 * SIDE},
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
    )


def cohere(outer: str, token: str, knobs: Knobs) -> Any:
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(knobs.layers)]
    return AutoConfig.for_model(
        outer,
        text_config=language("cohere2", knobs, sliding_window=8, layer_types=kinds),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        downsample_factor=MERGE,
        alignment_intermediate_size=20,
        tie_word_embeddings=knobs.tied,
        **{token: IMAGE},
    )


def tiles(config: Any) -> dict[str, Inputs]:
    """All tiles of all pictures one after another."""
    many = pictures(*[count * TILE for count in TILES])
    return {
        "text": text(),
        "image": pictures(TILE) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": many | {"pixel_values": noise(sum(TILES), 3, SIDE, SIDE, seed=1)},
    }


def slots(*counts: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Pictures by row, and zeros where a row has fewer than the longest."""
    pixels = noise(len(counts), max(counts), 3, height, width, seed=seed)
    for row, count in zip(pixels, counts, strict=True):
        row[count:] = 0
    return pixels


def tile_rows(config: Any) -> dict[str, Inputs]:
    """As many tiles in a row of token ids as in the same row of pictures."""
    first, *others = TILES
    many = batch(sentence([IMAGE] * TILE * first), sentence(*[[IMAGE] * TILE * count for count in others], seed=3))
    return {
        "text": text(),
        "image": pictures(TILE) | {"pixel_values": slots(1, height=SIDE, width=SIDE, seed=0)},
        "images": many | {"pixel_values": slots(first, sum(others), height=SIDE, width=SIDE, seed=1)},
    }


def canvases(config: Any) -> dict[str, Inputs]:
    """Pictures as wide as the canvas, the last one lower."""
    height, width = SIDE, SIDE + 2 * PATCH
    seen = torch.ones(2, 2, height, width, dtype=torch.bool)
    seen[1, 1, height // 2 :] = False
    many = {"pixel_values": slots(1, 2, height=height, width=width, seed=1), "pixel_attention_mask": seen}
    return {
        "text": text(),
        "image": pictures(LATENTS) | {"pixel_values": slots(1, height=height, width=width, seed=0)},
        "images": pictures(*[LATENTS] * 3) | many,
    }


def own_sizes(*sizes: tuple[int, int], seed: int) -> Inputs:
    heights, widths = zip(*sizes, strict=True)
    pixels = noise(len(sizes), 3, max(heights), max(widths), seed=seed)
    counts = [height * width // (PATCH * MERGE) ** 2 for height, width in sizes]
    return pictures(*counts) | {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def sized(config: Any) -> dict[str, Inputs]:
    return {"text": text(), "image": own_sizes(WIDE, seed=0), "images": own_sizes(TALL, SMALL, WIDE, seed=1)}


FAMILIES: list[tuple[str, Callable[[Knobs], Any], Callable[[Any], dict[str, Inputs]]]] = [
    ("idefics2", idefics2, canvases),
    *[(kind, partial(idefics3, kind), tile_rows) for kind in ("idefics3", "smolvlm")],
    *[(f"internvl+{kind}", partial(internvl, kind), tiles) for kind in ("qwen2", "llama")],
    ("mistral3", mistral3, sized),
    ("aya_vision", partial(cohere, "aya_vision", "image_token_index"), tiles),
    ("cohere2_vision", partial(cohere, "cohere2_vision", "image_token_id"), tiles),
]
TILE_KIND = [Specimen(name, config, inputs) for name, config, inputs in FAMILIES]
