"""Qwen's and GLM's families: pictures of any size as rows of patches, positions in three dimensions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import END, IMAGE, PATCH, START, VIDEO, batch, language, noise, sentence, text, vision

Grid = tuple[int, int, int]
ONE: list[Grid] = [(1, 4, 6)]
THREE: list[Grid] = [(1, 6, 4), (1, 2, 4), (1, 4, 8)]
CLIP: list[Grid] = [(2, 4, 6)]
MERGE, DEEP = 2, 2
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}


def rope(pairs: int, **more: Any) -> dict[str, Any]:
    """Rotary positions with the head's `pairs` of dimensions shared out between time, height and width."""
    third = pairs // 3
    sections = [pairs - 2 * third, third, third]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


def outer(kind: str, inner: dict[str, Any], tower: dict[str, Any], knobs: Knobs) -> Any:
    names = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    if kind.startswith("qwen"):
        names |= {"vision_start_token_id": START, "vision_end_token_id": END}
    else:
        names |= {"image_start_token_id": START, "image_end_token_id": END}
    return AutoConfig.for_model(kind, text_config=inner, vision_config=tower, tie_word_embeddings=knobs.tied, **names)


def tower(kind: str, **more: Any) -> dict[str, Any]:
    size = vision(f"{kind}_vision", depth=2, num_heads=2, spatial_merge_size=MERGE, temporal_patch_size=DEEP, **more)
    for absent in ("num_hidden_layers", "num_attention_heads") + (() if kind.startswith("glm") else ("image_size",)):
        del size[absent]
    return size


def qwen2(knobs: Knobs) -> Any:
    seen = tower("qwen2_vl", embed_dim=16, mlp_ratio=2) | {"hidden_size": knobs.width}
    del seen["intermediate_size"]
    inner = language("qwen2_vl_text", knobs, **rope(knobs.width // knobs.heads // 2))
    return outer("qwen2_vl", inner, seen, knobs)


def qwen2_5(knobs: Knobs) -> Any:
    """The tower's first layer looks through windows."""
    window = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "out_hidden_size": knobs.width}
    inner = language("qwen2_5_vl_text", knobs, **rope(knobs.width // knobs.heads // 2))
    return outer("qwen2_5_vl", inner, tower("qwen2_5_vl", **window), knobs)


def qwen3(kind: str, knobs: Knobs) -> Any:
    """Both layers of the tower feed the text model's first two; of the experts' layers, the second is dense."""
    seen = tower(kind, out_hidden_size=knobs.width, num_position_embeddings=36, deepstack_visual_indexes=[0, 1])
    head = knobs.width // knobs.heads
    more = {"head_dim": head, "attention_bias": knobs.bias, **rope(head // 2)}
    if kind.endswith("moe"):
        more |= EXPERTS | {"num_experts": 4, "mlp_only_layers": [1]}
    return outer(kind, language(f"{kind}_text", knobs, **more), seen, knobs)


def qwen3_5(kind: str, knobs: Knobs) -> Any:
    """Linear and full attention in turns, heads wider than the stream."""
    seen = tower(kind, out_hidden_size=knobs.width, num_position_embeddings=36)
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 12}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    kinds = [("linear_attention", "full_attention")[i % 2] for i in range(knobs.layers)]
    more = {"head_dim": 16, "attention_bias": knobs.bias, "layer_types": kinds, **linear}
    more |= rope(4, partial_rotary_factor=0.5)
    if kind.endswith("moe"):
        more |= EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 20}
    inner = language(f"{kind}_text", knobs, **more)
    if kind.endswith("moe"):
        del inner["intermediate_size"]
    return outer(kind, inner, seen, knobs)


def glm(kind: str, knobs: Knobs) -> Any:
    """The mixture's first layer is dense, the others have a shared expert."""
    seen = tower(kind, out_hidden_size=knobs.width, attention_bias=knobs.bias)
    head = knobs.width // knobs.heads
    more = rope(head // 2)
    if kind.endswith("moe"):
        more = rope(head // 4, partial_rotary_factor=0.5) | EXPERTS
        more |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        more |= {"attention_bias": knobs.bias, "routed_scaling_factor": 1.5}
    return outer(kind, language(f"{kind}_text", knobs, **more), seen, knobs)


def patches(grids: list[Grid], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = sum(t * h * w for t, h, w in grids)
    return noise(count, 3 * DEEP * PATCH**2, seed=seed), torch.tensor(grids)


def merged(grid: Grid) -> int:
    return grid[1] * grid[2] // MERGE**2


def rows(*tokens: list[list[int]], video: bool = False) -> Inputs:
    """A row per list of pictures, with each token's kind: text 0, picture 1, video 2."""
    made = batch(*[sentence(*runs, seed=seed) for seed, runs in enumerate(tokens)])
    seen = (made["input_ids"] == IMAGE) | (made["input_ids"] == VIDEO)
    return made | {"mm_token_type_ids": seen.int() * (2 if video else 1)}


def wrapped(token: int, count: int) -> list[int]:
    return [START, *[token] * count, END]


def stills(grids: list[Grid], seed: int) -> Inputs:
    runs = [wrapped(IMAGE, merged(grid)) for grid in grids]
    pixels, sizes = patches(grids, seed)
    made = rows(runs[:1], runs[1:]) if len(runs) > 1 else rows(runs)
    return made | {"pixel_values": pixels, "image_grid_thw": sizes}


def clip(token: int, apart: bool) -> Inputs:
    """A video: its frames in one run of tokens, or each apart from the next."""
    frames = CLIP[0][0]
    run = [wrapped(token, merged(CLIP[0]))] * frames if apart else [wrapped(token, frames * merged(CLIP[0]))]
    pixels, sizes = patches(CLIP, seed=2)
    return rows(run, video=True) | {"pixel_values_videos": pixels, "video_grid_thw": sizes}


def grids(config: Any, token: int, apart: bool) -> dict[str, Inputs]:
    seconds = {"second_per_grid_ts": torch.tensor([1])} if config.model_type == "qwen2_5_vl" else {}
    return {
        "text": text(),
        "image": stills(ONE, seed=0),
        "images": stills(THREE, seed=1),
        "video": clip(token, apart) | seconds,
    }


FAMILIES: list[tuple[str, Callable[[Knobs], Any], int, bool]] = [
    ("qwen2_vl", qwen2, VIDEO, False),
    ("qwen2_5_vl", qwen2_5, VIDEO, False),
    *[(kind, partial(qwen3, kind), VIDEO, True) for kind in ("qwen3_vl", "qwen3_vl_moe")],
    *[(kind, partial(qwen3_5, kind), VIDEO, True) for kind in ("qwen3_5", "qwen3_5_moe")],
    *[(kind, partial(glm, kind), IMAGE, True) for kind in ("glm4v", "glm4v_moe")],
]
GRID_KIND = [
    Specimen(name, config, partial(grids, token=token, apart=apart)) for name, config, token, apart in FAMILIES
]
