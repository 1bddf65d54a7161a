"""Families unlike the others: Idefics, Kosmos-2, Molmo 2, Phi-4 multimodal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import BOS, EOS, GRID, IMAGE, PAD, PATCH, SIDE, VOCAB, language, noise, pictures, text, vision

LATENTS = 3
POOL = 2
BLOCKS = (GRID // POOL) ** 2
EXTRA = 8
MOLMO_IMAGE = IDEFICS_IMAGE = VOCAB + 2
AUDIO = 5


def idefics(gates: str, knobs: Knobs) -> Any:
    """Cross-attention before every layer, gated by a number; or before the first, gated by channel and resampled.

    The picture's token is one of the additional ones, embedded apart.
    """
    vector = gates == "vector"
    inner = language("idefics", knobs, additional_vocab_size=EXTRA)
    for absent in ("model_type", "num_key_value_heads"):
        del inner[absent]
    resampler = {"use_resampler": vector, "resampler_n_latents": LATENTS, "resampler_depth": 1}
    return AutoConfig.for_model(
        "idefics",
        **inner,
        alpha_type=gates,
        cross_layer_interval=knobs.layers if vector else 1,
        qk_layer_norms=vector,
        use_resampler=vector,
        vision_config=vision("idefics_vision", embed_dim=16),
        perceiver_config=resampler | {"resampler_n_heads": 2, "resampler_head_dim": 8},
    )


def kosmos(knobs: Knobs) -> Any:
    sizes = {"embed_dim": knobs.width, "layers": knobs.layers, "attention_heads": knobs.heads, "ffn_dim": 40}
    tokens = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "tie_word_embeddings": knobs.tied}
    return AutoConfig.for_model(
        "kosmos-2",
        text_config={"vocab_size": VOCAB, "max_position_embeddings": 256, **sizes, **tokens},
        vision_config=vision("kosmos_2_vision_model"),
        latent_query_num=LATENTS,
        tie_word_embeddings=knobs.tied,
    )


def molmo2(norm_after: bool, knobs: Knobs) -> Any:
    """More embeddings than the head has words, the picture's among them, so never tied."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": knobs.bias}
    more = {"head_dim": knobs.width // knobs.heads, "attention_bias": knobs.bias, "additional_vocab_size": EXTRA}
    more |= {"norm_after": norm_after, "tie_word_embeddings": False}
    seen = vision("molmo2_vision") | heads | {"image_size": [SIDE, SIDE]}
    bridge = {
        "vision_feature_layer": [0, 1],
        "hidden_size": 16,
        "intermediate_size": 24,
        "text_hidden_size": knobs.width,
    }
    return AutoConfig.for_model(
        "molmo2",
        text_config=language("molmo2_text", knobs, **more),
        vision_config=seen,
        adapter_config=bridge | heads | {"text_hidden_size": knobs.width},
        image_patch_id=MOLMO_IMAGE,
        tie_word_embeddings=False,
    )


def phi4(knobs: Knobs) -> Any:
    inner = language("phi4_multimodal", knobs)
    del inner["model_type"]
    sound = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}
    sound |= {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16}
    return AutoConfig.for_model(
        "phi4_multimodal",
        **inner,
        vision_config=vision("phi4_multimodal_vision", crop_size=SIDE, image_token_id=IMAGE),
        audio_config=sound | {"time_reduction": 4, "audio_token_id": AUDIO},
    )


def attended(made: Inputs, shown: int, seed: int) -> Inputs:
    """`shown` pictures to a row; each word sees the pictures whose tokens it follows."""
    follows = (made["input_ids"] == IDEFICS_IMAGE).cumsum(dim=1)
    sees = follows[..., None] > torch.arange(shown)
    pixels = noise(len(follows), shown, 3, SIDE, SIDE, seed=seed)
    return made | {"pixel_values": pixels, "image_attention_mask": sees.long()}


def crossed(config: Any) -> dict[str, Inputs]:
    """The class wants pictures even where no word sees one."""
    return {
        "text": attended(text(), shown=1, seed=2),
        "image": attended(pictures(1, token=IDEFICS_IMAGE), shown=1, seed=0),
        "images": attended(pictures(1, 1, 1, token=IDEFICS_IMAGE), shown=2, seed=1),
    }


def latent(config: Any) -> dict[str, Inputs]:
    """Without a picture the class wants an empty tensor of latents."""
    words = text()
    nothing = {"image_embeds": torch.zeros(0, LATENTS, config.text_config.embed_dim, dtype=torch.float64)}
    return {
        "text": masked(words) | nothing,
        "image": masked(pictures(LATENTS)) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": masked(pictures(*[LATENTS] * 3)) | {"pixel_values": noise(3, 3, SIDE, SIDE, seed=1)},
    }


def masked(made: Inputs) -> Inputs:
    return made | {"image_embeds_position_mask": (made["input_ids"] == IMAGE).long()}


def pools(crops: int) -> Tensor:
    """Blocks of four patches, crop by crop; the last block of all misses a patch."""
    patches = torch.arange(crops * GRID**2).view(crops, GRID // POOL, POOL, GRID // POOL, POOL)
    blocks = patches.transpose(2, 3).reshape(-1, POOL**2).clone()
    blocks[-1, -1] = -1
    return blocks


def cropped(*crops: int, seed: int) -> Inputs:
    """Each picture whole, and cut into crops side by side."""
    side = GRID // POOL
    made = pictures(*[BLOCKS * (1 + count) for count in crops], token=MOLMO_IMAGE)
    total = sum(crops) + len(crops)
    return bidirectional(made) | {
        "pixel_values": noise(total, GRID**2, 3 * PATCH**2, seed=seed),
        "image_token_pooling": pools(total),
        "image_grids": torch.tensor([[side, side, side, side * count] for count in crops]),
    }


def bidirectional(made: Inputs) -> Inputs:
    return made | {"mm_token_type_ids": (made["input_ids"] == MOLMO_IMAGE).long()}


def molmo2_inputs(config: Any) -> dict[str, Inputs]:
    frames, side = 3, GRID // POOL
    clip = {
        "pixel_values_videos": noise(frames, GRID**2, 3 * PATCH**2, seed=2),
        "video_token_pooling": pools(frames),
        "video_grids": torch.tensor([[frames, side, side]]),
    }
    return {
        "text": text(),
        "image": cropped(2, seed=0),
        "images": cropped(1, 3, 2, seed=1),
        "video": bidirectional(pictures(frames * BLOCKS, token=MOLMO_IMAGE)) | clip,
    }


def phi4_crops(*sizes: tuple[int, int], seed: int) -> Inputs:
    """Pictures of so many crops by so many, the lower half of the last picture's last crop empty."""
    most = max(rows * columns for rows, columns in sizes)
    seen = torch.ones(len(sizes), 1 + most, GRID, GRID, dtype=torch.bool)
    rows, columns = sizes[-1]
    half = GRID // 2
    if rows > 1:
        seen[-1, rows * columns, half:] = False
    heights = [rows * half for rows, _ in sizes]
    heights[-1] -= half // 2 if rows > 1 else 0
    whole = half * (half + 1) + 1
    counts = [whole + height * (columns * half + 1) for height, (_, columns) in zip(heights, sizes, strict=True)]
    return pictures(*counts) | {
        "image_pixel_values": noise(len(sizes), 1 + most, 3, SIDE, SIDE, seed=seed),
        "image_sizes": torch.tensor(sizes) * SIDE,
        "image_attention_mask": seen,
    }


def phi4_inputs(config: Any) -> dict[str, Inputs]:
    return {
        "text": text(),
        "image": phi4_crops((1, 2), seed=0),
        "images": phi4_crops((1, 1), (1, 2), (2, 1), seed=1),
    }


FAMILIES: list[tuple[str, Callable[[Knobs], Any], Callable[[Any], dict[str, Inputs]]]] = [
    ("idefics", partial(idefics, "float"), crossed),
    ("idefics+vector", partial(idefics, "vector"), crossed),
    ("kosmos-2", kosmos, latent),
    ("molmo2", partial(molmo2, False), molmo2_inputs),
    ("molmo2+norm_after", partial(molmo2, True), molmo2_inputs),
    ("phi4_multimodal", phi4, phi4_inputs),
]
ODDITIES = [Specimen(name, config, inputs) for name, config, inputs in FAMILIES]
