"""Inputs for comparing two forms of a model: real prompts where there is a processor, else drawn from the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PretrainedConfig, PreTrainedModel

from ..guard.errors import InputError
from ..guard.prompts import Prompt, encode, illustrated
from ..guard.vlm import VLM, load_processor

TEXTS = ("How to bake bread at home?", "How do people usually travel to work, and why do some of them prefer to walk?")
SYNTHETIC_TOKENS = 24


def comparison_batches(model: PreTrainedModel, folder: Path) -> dict[str, BatchFeature]:
    """name -> inputs: a left-padded batch of two texts, and one prompt with a picture. Float inputs are float32."""
    try:
        processor = load_processor(folder)
    except InputError:
        return _synthetic(model.config)
    vlm = VLM(model, processor, folder)
    prompts = [Prompt(text) for text in TEXTS]
    return {"text": encode(vlm, prompts), "image": encode(vlm, illustrated(prompts[1:], "shape"))}


def _synthetic(config: PretrainedConfig) -> dict[str, BatchFeature]:
    """Random tokens, and a random picture where its features go, for a LLaVA-type config without a processor."""
    draw = torch.Generator().manual_seed(0)
    text, vision = config.get_text_config(), config.vision_config
    usable = [i for i in range(text.vocab_size) if i != config.image_token_id]

    def tokens(count: int) -> torch.Tensor:
        return torch.tensor(usable)[torch.randint(len(usable), (1, count), generator=draw)]

    short, long = tokens(SYNTHETIC_TOKENS // 2), tokens(SYNTHETIC_TOKENS)
    padding = SYNTHETIC_TOKENS - short.shape[1]
    ids = torch.cat([torch.nn.functional.pad(short, (padding, 0), value=usable[0]), long])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    side = vision.image_size
    patches = (side // vision.patch_size) ** 2 + (
        getattr(config, "vision_feature_select_strategy", "default") == "full"
    )
    pixels = torch.randn(1, 3, side, side, generator=draw)
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if config.model_type == "llava_next":  # one tile and the whole picture, a newline after each row of the tile
        inputs = {"pixel_values": pixels.expand(1, 2, -1, -1, -1), "image_sizes": torch.tensor([[side, side]])}
        patches += patches + side // vision.patch_size
    image = torch.full((1, patches), config.image_token_id)
    sequence = torch.cat([tokens(4), image, tokens(8)], dim=1)
    return {
        "text": BatchFeature({"input_ids": ids, "attention_mask": mask}),
        "image": BatchFeature({"input_ids": sequence, "attention_mask": torch.ones_like(sequence), **inputs}),
    }
