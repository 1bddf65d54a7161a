"""Inputs for comparing two forms of a model: real prompts where there is a processor, else drawn from the config."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from ...guard.base.errors import InputError
from ...guard.model.processor import QUESTION
from ...guard.model.roles import skipped_on_text
from ...guard.model.trial import Exhausting
from ...guard.model.vlm import VLM, image_token_of, load_processor
from ...guard.prompts.image_kinds import COMPARED_KINDS
from ...guard.prompts.prompts import Prompt, encode, illustrated

Batches = Mapping[str, BatchFeature]
"""What a batch holds -> the batch."""

GREEDY_TOKENS = 32
"""That a model is asked for after every prompt, and another form of it must say as well."""

TEXTS = ("How to bake bread at home?", QUESTION)
SYNTHETIC_TOKENS = 24


def comparison_batches(model: PreTrainedModel, folder: Path) -> dict[str, BatchFeature]:
    """Returns name -> inputs: a left-padded batch of two texts, and one prompt with a picture. Float inputs are
    float32.

    Without a processor, both are drawn from the config; a class that takes its pictures in a form unknown here then
    gets no "image".  Raises InputError if such a class has layers that nothing but a picture runs.
    """
    try:
        processor = load_processor(folder)
    except Exhausting:
        raise
    except InputError as error:
        batches = {name: batch for name, batch in _drawn(model).items() if _runs(model, batch)}
        if "image" not in batches and (unseen := skipped_on_text(model)):
            raise InputError(
                f"{error}; layer {min(unseen)} runs only with a picture, and is not compared without"
            ) from error
        return batches
    vlm = VLM(model, processor, folder)
    prompts = [Prompt(text) for text in TEXTS]
    return {"text": encode(vlm, prompts), "image": encode(vlm, illustrated(prompts[1:], COMPARED_KINDS[0]))}


def _drawn(model: PreTrainedModel) -> dict[str, BatchFeature]:
    config = model.config
    draw = torch.Generator().manual_seed(0)
    special = {value for name, value in vars(config).items() if name.endswith(("token_id", "token_index"))}
    words = torch.tensor([word for word in range(config.get_text_config().vocab_size) if word not in special])

    def tokens(count: int) -> Tensor:
        return words[torch.randint(len(words), (1, count), generator=draw)]

    padding = SYNTHETIC_TOKENS // 2
    short, long = tokens(SYNTHETIC_TOKENS - padding), tokens(SYNTHETIC_TOKENS)
    ids = torch.cat([torch.nn.functional.pad(short, (padding, 0), value=int(words[0])), long])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    batches = {"text": BatchFeature({"input_ids": ids, "attention_mask": mask})}
    picture = _picture(model, draw)
    if picture is not None:
        pixels, features = picture
        token = image_token_of(config)
        image = torch.full((1, features), token)
        sequence = torch.cat([tokens(4), image, tokens(8)], dim=1)
        text = {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            text["mm_token_type_ids"] = sequence.eq(token).int()
        batches["image"] = BatchFeature({**text, **pixels})
    return batches


def _runs(model: PreTrainedModel, batch: BatchFeature) -> bool:
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    except Exception:  # what a class asks for beside words and pixels cannot be known
        return False
    return True


def _picture(model: Any, draw: torch.Generator) -> tuple[dict[str, Tensor], int] | None:
    """Returns (keyword arguments that show `model` one random picture, the number of features it becomes), in the first
    of the usual forms that its vision tower takes; None if it takes none of them.
    """
    vision = getattr(model.config, "vision_config", None)
    sizes = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    side, patch = (size[0] if isinstance(size, list | tuple) else size for size in sizes)
    if image_token_of(model.config) < 0 or not hasattr(model, "get_image_features"):
        return None
    forms: list[dict[str, Tensor]] = []
    if isinstance(side, int):
        pixels, size = torch.randn(1, 3, side, side, generator=draw), torch.tensor([[side, side]])
        forms += [
            {"pixel_values": pixels},
            {"pixel_values": pixels.expand(1, 2, -1, -1, -1), "image_sizes": size},  # one tile and the whole picture
            {"pixel_values": pixels, "image_sizes": size},
            {"pixel_values": pixels[None]},
        ]
    if isinstance(patch, int):
        merge = 2 * getattr(vision, "spatial_merge_size", 2)
        values = getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * patch**2
        patches = torch.randn(merge**2, values, generator=draw)
        forms.append({"pixel_values": patches, "image_grid_thw": torch.tensor([[1, merge, merge]])})
    taken = inspect.signature(model.forward).parameters
    for form in forms:
        if not set(form) <= set(taken):
            continue
        try:
            with torch.no_grad():
                features = _count(model.get_image_features(**form), model.config.get_text_config().hidden_size)
        except Exception:  # not the form that this class takes
            continue
        if features:
            return form, features
    return None


def _count(features: Any, width: int) -> int:
    """Returns how many states of the residual stream `features` hold, in whatever container they come."""
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // width for part in parts if isinstance(part, Tensor))
