"""PaliGemma and Gemma: scaled embeddings, norms after sublayers, pictures that see themselves both ways."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import END, GRID, IMAGE, PATCH, SIDE, START, VIDEO, language, noise, pictures, text, vision

SIGLIP = {"vision_use_head": False}
POOL = 2
WINDOW = 8


def turns(layers: int) -> list[str]:
    """Full and sliding attention in turns, full at the end."""
    kinds = [("full_attention", "sliding_attention")[i % 2] for i in range(layers)]
    return [*kinds[:-1], "full_attention"]


def sliding(kind: str, knobs: Knobs) -> dict[str, Any]:
    if kind == "gemma":
        return language(kind, knobs)
    head = knobs.width // knobs.heads
    kinds = {"sliding_window": WINDOW, "layer_types": turns(knobs.layers)}
    return language(kind, knobs, query_pre_attn_scalar=head, **kinds)


def paligemma(kind: str, knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "paligemma",
        text_config=sliding(kind, knobs),
        vision_config=vision("siglip_vision_model", **SIGLIP),
        image_token_index=IMAGE,
        projection_dim=knobs.width,
        hidden_size=knobs.width,
        tie_word_embeddings=knobs.tied,
    )


def gemma3(knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "gemma3",
        text_config=sliding("gemma3_text", knobs),
        vision_config=vision("siglip_vision_model", **SIGLIP),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=(GRID // POOL) ** 2,
        tie_word_embeddings=knobs.tied,
    )


def gemma4(knobs: Knobs, experts: bool = False) -> Any:
    """Small: inputs to each layer, the last layer using an earlier one's keys; or experts beside each MLP."""
    own = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 1}
    if experts:
        own = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
        own |= {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
    kinds = {"sliding_window": WINDOW, "layer_types": turns(knobs.layers), "use_bidirectional_attention": "vision"}
    heads = {"head_dim": knobs.width // knobs.heads, "global_head_dim": 16, "attention_bias": knobs.bias}
    seen = vision("gemma4_vision", num_key_value_heads=2, head_dim=8, pooling_kernel_size=POOL)
    return AutoConfig.for_model(
        "gemma4",
        text_config=language("gemma4_text", knobs, **own, **kinds, **heads),
        vision_config=seen | {"position_embedding_size": 16},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=START,
        eoi_token_id=END,
        tie_word_embeddings=knobs.tied,
    )


def gemma3n(knobs: Knobs) -> Any:
    """As Gemma 4, and several streams beside each other; the tower a convolutional one."""
    own = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 1}
    streams = {"altup_num_inputs": 2, "laurel_rank": 4, "head_dim": knobs.width // knobs.heads}
    kinds = {"sliding_window": WINDOW, "layer_types": turns(knobs.layers)}
    return AutoConfig.for_model(
        "gemma3n",
        text_config=language("gemma3n_text", knobs, **own, **streams, **kinds),
        vision_config={"hidden_size": 16, "vocab_size": 4, "vocab_offset": 56},
        audio_config={"hidden_size": 16, "vocab_size": 4, "vocab_offset": 60, "conf_num_hidden_layers": 1},
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def prefix(made: Inputs) -> Inputs:
    """PaliGemma's token types: 0 up to the last two words, which see only what is before them."""
    kinds = torch.zeros_like(made["input_ids"])
    kinds[:, -2:] = 1
    return made | {"token_type_ids": kinds}


def marked(made: Inputs, name: str) -> Inputs:
    ids = made["input_ids"]
    return made | {name: (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def pali_inputs(config: Any) -> dict[str, Inputs]:
    return {
        "text": text(),
        "image": prefix(pictures(GRID**2)) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": prefix(pictures(*[GRID**2] * 3)) | {"pixel_values": noise(3, 3, SIDE, SIDE, seed=1)},
    }


def gemma3_inputs(config: Any) -> dict[str, Inputs]:
    count, kinds = (GRID // POOL) ** 2, "token_type_ids"
    return {
        "text": text(),
        "image": marked(pictures(count), kinds) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": marked(pictures(*[count] * 3), kinds) | {"pixel_values": noise(3, 3, SIDE, SIDE, seed=1)},
    }


def placed(*sizes: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of pictures of (rows, columns), and each patch's (column, row); -1 where a smaller picture has none."""
    longest = max(rows * columns for rows, columns in sizes)
    where = torch.full((len(sizes), longest, 2), -1)
    for places, (rows, columns) in zip(where, sizes, strict=True):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places[: rows * columns] = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return noise(len(sizes), longest, 3 * PATCH**2, seed=seed), where


def stills(*sizes: tuple[int, int], seed: int) -> Inputs:
    pixels, where = placed(*sizes, seed=seed)
    made = pictures(*[rows * columns // POOL**2 for rows, columns in sizes])
    return marked(made, "mm_token_type_ids") | {"pixel_values": pixels, "image_position_ids": where}


def gemma4_inputs(config: Any) -> dict[str, Inputs]:
    pixels, where = placed((4, 6), (4, 6), seed=2)
    clip = {"pixel_values_videos": pixels, "video_position_ids": where, "num_frames_per_video": torch.tensor([2])}
    return {
        "text": text(),
        "image": stills((4, 6), seed=0),
        "images": stills((6, 4), (2, 4), (4, 8), seed=1),
        "video": marked(pictures(12, token=VIDEO), "mm_token_type_ids") | clip,
    }


GEMMA3N = Specimen("gemma3n", gemma3n, gemma3_inputs)
GEMMA_KIND = [
    *[Specimen(f"paligemma+{kind}", partial(paligemma, kind), pali_inputs) for kind in ("gemma", "gemma2")],
    Specimen("gemma3", gemma3, gemma3_inputs),
    Specimen("gemma4", gemma4, gemma4_inputs),
    Specimen("gemma4+experts", partial(gemma4, experts=True), gemma4_inputs),
]
