"""What the specimens beyond the writers' table share: text settings, padded prompts, pictures as raw tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specimens import Inputs, Knobs

VOCABULARY, WORDS = 64, 50
START, END, IMAGE, VIDEO, AUDIO = 58, 59, 60, 61, 62
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PATCH = 4
AUDIO_START, AUDIO_END = 56, 57
PIXTRAL: dict[str, Any] = {"model_type": "pixtral", "head_dim": 8, "image_size": 32}


def text_settings(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """The settings nearly every text model knows, and what a family adds to them."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": knobs.width,
        "intermediate_size": 40,
        "num_hidden_layers": knobs.layers,
        "num_attention_heads": knobs.heads,
        "num_key_value_heads": knobs.kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": knobs.tied,
        **TOKENS,
        **more,
    }


def marks(tied: bool) -> dict[str, Any]:
    """Settings of an outer config: what stands for pictures and videos, and whether the head is the embedding."""
    return {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": tied}


def vision_settings(**more: Any) -> dict[str, Any]:
    """A vision tower of two layers, width 16."""
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": PATCH,
        **more,
    }


def latent_attention(knobs: Knobs) -> dict[str, Any]:
    """Low-rank queries, keys and values."""
    return {
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 6,
        "num_key_value_heads": knobs.heads,
    }


def rope(knobs: Knobs, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """Three-axis rotary positions whose sections fill half of a head of width / heads."""
    half = knobs.width // knobs.heads // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}


def half_rope() -> dict[str, Any]:
    """Three-axis rotary positions on half of a head of sixteen."""
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }


def words(count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens, none of them special."""
    return torch.randint(3, WORDS, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise(*shape: int, seed: int = 7) -> Tensor:
    """Float64 numbers that do for pixel values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prompts(*rows: Sequence[int]) -> Inputs:
    """The rows as one batch, padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def text_only() -> Inputs:
    """Two prompts of different lengths."""
    return prompts(words(9, 1), words(6, 2))


def spoken(count: int, mark: int = IMAGE, seed: int = 0) -> list[int]:
    """A prompt with one picture of so many placeholders in it."""
    return [*words(3, seed), START, *[mark] * count, END, *words(4, seed + 1)]


def one(count: int, mark: int = IMAGE) -> Inputs:
    """One prompt with one picture."""
    return prompts(spoken(count, mark))


def several(counts: Sequence[int], mark: int = IMAGE) -> Inputs:
    """Two prompts, padded: the first has the first picture, the second all the others."""
    first, *rest = counts
    long = [token for seed, count in enumerate(rest) for token in spoken(count, mark, seed + 3)]
    return prompts(spoken(first, mark, 9), long)


def kinds(inputs: Inputs) -> Tensor:
    """0 for text, 1 for image and 2 for video placeholders."""
    ids = inputs["input_ids"]
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


def gridded(
    pixels: tuple[int, ...],
    merge: int = 2,
    frames: int = 2,
    tokens: Callable[[int, int, int], int] | None = None,
    with_kinds: bool = False,
    apart: bool = False,
) -> Mapping[str, Inputs]:
    """Inputs of the classes that take flat patches and a (time, height, width) grid for each picture.

    pixels: the shape of one patch.  frames: length of the video in temporal patches, 0 for no video.
    tokens: how many placeholders a grid stands for; by default one for each merged patch of each frame.
    with_kinds: whether the class wants to be told which tokens are placeholders.  apart: whether each frame of a video
    stands on its own among the tokens.
    """
    single, many = [(1, 4, 6)], [(1, 4, 4), (1, 2, 6), (1, 6, 2)]

    def patches(grids: Sequence[tuple[int, int, int]], seed: int) -> Tensor:
        return noise(sum(t * h * w for t, h, w in grids), *pixels, seed=seed)

    def merged(t: int, h: int, w: int) -> int:
        return t * h * w // merge**2

    count = tokens or merged
    modalities = {"text": text_only()}
    modalities["image"] = one(count(*single[0])) | pictures(patches(single, 1), single)
    modalities["images"] = several([count(*grid) for grid in many]) | pictures(patches(many, 2), many)
    if frames:
        film = [(frames, 4, 4)]
        row = [token for _ in range(frames) for token in spoken(count(1, 4, 4), VIDEO)] if apart else None
        modalities["video"] = prompts(row or spoken(count(*film[0]), VIDEO)) | films(patches(film, 3), film)
    if with_kinds:
        modalities = {name: given | {"mm_token_type_ids": kinds(given)} for name, given in modalities.items()}
    return modalities


def pictures(patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Inputs:
    """Patches and grids under the names the classes take pictures by."""
    return {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}


def films(patches: Tensor, grids: Sequence[tuple[int, int, int]]) -> Inputs:
    """Patches and grids under the names the classes take videos by."""
    return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor(grids)}


def plain(count: int, side: int, many: int = 3) -> Mapping[str, Inputs]:
    """Inputs of the classes that take square pictures of one size, each as many placeholders."""
    return {
        "text": text_only(),
        "image": one(count) | {"pixel_values": noise(1, 3, side, side)},
        "images": several([count] * many) | {"pixel_values": noise(many, 3, side, side)},
    }


def two_frame_patches(config: Any) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids."""
    return gridded((3 * 2 * PATCH**2,))


def pixtral_inputs(config: Any) -> Mapping[str, Inputs]:
    """Pictures of several sizes, padded to the largest; eight pixels a side for each token."""
    sizes = torch.tensor([[16, 16], [8, 24], [24, 8]])
    pixels = noise(3, 3, 24, 24)
    return {
        "text": text_only(),
        "image": one(3) | {"pixel_values": pixels[:1, :, :8], "image_sizes": sizes[1:2]},
        "images": several([4, 3, 3]) | {"pixel_values": pixels, "image_sizes": sizes},
    }


def places(rows: int, columns: int) -> Tensor:
    """Column and row of every patch of a picture, row by row."""
    return torch.tensor([[column, row] for row in range(rows) for column in range(columns)])
