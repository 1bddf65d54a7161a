"""Mllama's cross-attention, and the mixtures of experts of Llama 4 and Aria."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import END, GRID, IMAGE, SIDE, START, language, noise, pictures, text, vision

TILE = (GRID // 2) ** 2
QUERIES = {GRID**2: 3, 6 * GRID: 5}
RATIOS = [[1, 1], [1, 2], [2, 1]]


def mllama(knobs: Knobs) -> Any:
    """Every second layer looks at the picture; the embedding has eight rows more than the head, so never tied."""
    seen = vision("mllama_vision_model", num_global_layers=1, max_num_tiles=2, supported_aspect_ratios=RATIOS)
    seen |= {"attention_heads": 2, "intermediate_layers_indices": [0, 1], "vision_output_dim": 48}
    del seen["num_attention_heads"]
    crossing = list(range(1, knobs.layers, 2))
    inner = language("mllama_text_model", knobs, cross_attention_layers=crossing) | {"tie_word_embeddings": False}
    return AutoConfig.for_model("mllama", text_config=inner, vision_config=seen, image_token_index=IMAGE)


def llama4(knobs: Knobs) -> Any:
    """Dense layers and mixtures in turns; rotary positions in all layers but the last; heads wider than the stream."""
    seen = vision("llama4_vision_model", vision_output_dim=20, projector_input_dim=20, projector_output_dim=20)
    turns = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": knobs.layers, "attention_chunk_size": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "intermediate_size_mlp": 40}
    more = {"head_dim": 16, "attention_bias": knobs.bias, **turns, **experts}
    return AutoConfig.for_model(
        "llama4",
        text_config=language("llama4_text", knobs, **more),
        vision_config=seen | {"intermediate_size": 64},
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=knobs.tied,
    )


def aria(knobs: Knobs) -> Any:
    more = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2, "intermediate_size": 24}
    return AutoConfig.for_model(
        "aria",
        text_config=language("aria_text", knobs, attention_bias=knobs.bias, mlp_bias=knobs.bias, **more),
        vision_config=vision("idefics3_vision"),
        projector_patch_to_query_dict=QUERIES,
        image_token_index=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def crossed(*tiles: list[int], made: Inputs, seed: int) -> Inputs:
    """A row per list, a picture per count of tiles, each seen from its token on; one tile, or two side by side."""
    most = max(map(len, tiles))
    pixels = noise(len(tiles), most, 2, 3, SIDE, SIDE, seed=seed)
    ratios, there = torch.zeros(len(tiles), most, dtype=torch.long), torch.zeros(len(tiles), most, 2, dtype=torch.long)
    sees = torch.zeros(*made["input_ids"].shape, most, 2, dtype=torch.long)
    for row, counts in enumerate(tiles):
        pixels[row, len(counts) :] = 0
        there[row, :, 0] = 1
        for picture, (count, at) in enumerate(zip(counts, starts(made["input_ids"][row]), strict=True)):
            pixels[row, picture, count:] = 0
            ratios[row, picture] = count
            there[row, picture, :count] = 1
            sees[row, at:, picture, :count] = 1
    masks = {"aspect_ratio_ids": ratios, "aspect_ratio_mask": there, "cross_attention_mask": sees}
    return made | {"pixel_values": pixels, **masks}


def starts(row: torch.Tensor) -> list[int]:
    return (row == IMAGE).nonzero().flatten().tolist()


def crossings(config: Any) -> dict[str, Inputs]:
    return {
        "text": text(),
        "image": crossed([1], made=pictures(1), seed=0),
        "images": crossed([2], [1, 2], made=pictures(1, 1, 1), seed=1),
    }


def tiles(config: Any) -> dict[str, Inputs]:
    return {
        "text": text(),
        "image": pictures(TILE) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": pictures(TILE, 3 * TILE, 2 * TILE) | {"pixel_values": noise(6, 3, SIDE, SIDE, seed=1)},
    }


def queries(config: Any) -> dict[str, Inputs]:
    """The more patches the more queries; the second of several pictures fills half of its canvas."""
    height, width = SIDE, 6 * SIDE // GRID
    seen = torch.ones(3, height, width, dtype=torch.bool)
    seen[1, height // 2 :] = False
    few, many = QUERIES.values()
    return {
        "text": text(),
        "image": pictures(few) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": pictures(*[many] * 3) | {"pixel_values": noise(3, 3, height, width, seed=1), "pixel_mask": seen},
    }


MIXTURE = [
    Specimen("mllama", mllama, crossings),
    Specimen("llama4", llama4, tiles),
    Specimen("aria", aria, queries),
]
