"""Prompts as a model sees them: anchor pairs, image kinds, chat template, left-padded batches."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from ..base.errors import InputError
from ..base.untrusted import open_regular
from ..model.processor import encoded
from ..model.vlm import VLM, image_token_of
from .image_files import MAX_PIXELS_AT_ONCE
from .image_kinds import ImageKind, draw
from .prompt_files import field, rows

BUILT_IN_ANCHORS = Path(str(files("guardfold.guard") / "data" / "anchors.jsonl"))
PLACEHOLDERS = ("image_token", "boi_token", "video_token", "audio_token")
"""What processors call the words in whose place they put something else."""


@dataclass(frozen=True)
class Prompt:
    """One user turn: `text`, an image if there is one, and the expected answer where a file says it.

    near: whether it is a near miss, harmful by its words only.
    """

    text: str
    image: Image.Image | None = None
    answer: str | None = None
    near: bool = False


@dataclass(frozen=True)
class Anchors:
    """N paired queries: harmful[i] and harmless[i] differ in harm and as little else as possible.

    wordings: the way in which each pair asks, "" where its file does not say.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    wordings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.wordings:
            object.__setattr__(self, "wordings", ("",) * len(self.harmful))

    def __len__(self) -> int:
        return len(self.harmful)

    def head(self, count: int) -> Anchors:
        """Returns the first `count` pairs."""
        return Anchors(self.harmful[:count], self.harmless[:count], self.wordings[:count])

    @property
    def hash(self) -> str:
        """SHA-256 over the pairs in order, hexadecimal."""
        return hashlib.sha256(json.dumps([self.harmful, self.harmless]).encode()).hexdigest()


def beside(folder: Path, name: str) -> Path | None:
    """Returns the file `name` that a model folder brings for its own measurement, if it does. InputError if it is no
    regular file of that folder.
    """
    if not os.path.lexists(folder / name):
        return None
    os.close(open_regular(folder, name))
    return folder / name


def load_anchors(path: Path = BUILT_IN_ANCHORS) -> Anchors:
    """Anchor pairs from JSONL or CSV with `harmful` and `harmless` columns, and `wording` if it has one. InputError
    naming the line if malformed.
    """
    pairs = [
        (
            field(path, number, row, "harmful"),
            field(path, number, row, "harmless"),
            field(path, number, row, "wording") if row.get("wording") else "",
        )
        for number, row in rows(path)
    ]
    if not pairs:
        raise InputError(f"{path}: no anchor pairs")
    return Anchors(*zip(*pairs, strict=True))


def illustrated(prompts: Iterable[Prompt], kind: ImageKind | None) -> list[Prompt]:
    """Returns the same prompts with a picture of `kind` attached to each, always the same one for the same text; as
    they are for None. Do this batch by batch: a thousand pictures are a third of a gigabyte.
    """
    if kind is None:
        return list(prompts)
    return [replace(prompt, image=draw(kind, prompt.text, prompt.text)) for prompt in prompts]


def at_once(vlm: VLM, prompts: Iterable[Prompt]) -> int:
    """Prompts a batch: as many as suit the model, and fewer of those that bring large pictures."""
    largest = max(map(pixels, prompts), default=0)
    return min(vlm.batch_size, max(1, MAX_PIXELS_AT_ONCE // max(1, largest)))


def pixels(prompt: Prompt) -> int:
    """Of the picture that a prompt brings; 0 without one."""
    return prompt.image.width * prompt.image.height if prompt.image else 0


def encode(vlm: VLM, prompts: Sequence[Prompt]) -> BatchFeature:
    """Model inputs for `prompts` in the model's own form, up to where its answer begins; on the model's device.

    input_ids, attention_mask: [batch, positions], padded on the left, so that position -1 is the last prompt token of
    every row.  pixel_values where there are images, in the model's dtype, and whatever else its class takes.  All or
    none of `prompts` have an image.  InputError for a text with a word that stands for a picture, and for a processor
    that gives pictures no place.
    """
    check_words(vlm, (prompt.text for prompt in prompts))
    batch = encoded(vlm.processor, [(prompt.text, prompt.image) for prompt in prompts], vlm.folder)
    taken = inspect.signature(vlm.model.forward).parameters
    if "token_type_ids" not in taken:
        batch.pop("token_type_ids", None)
    token = image_token_of(vlm.model.config)
    if token >= 0 and any(prompt.image for prompt in prompts) and not (batch["input_ids"] == token).any():
        raise InputError(
            f"{vlm.folder}: its processor puts no image token (number {token} in config.json) into a prompt with a "
            "picture; compare the tokenizer and processor_config.json with the published ones"
        )
    if "pixel_values" not in batch and "pixel_values" in taken and taken["pixel_values"].default is Parameter.empty:
        batch.update(_unseen(vlm, len(prompts)))
    return batch.to(vlm.device, dtype=vlm.model.dtype)


def _unseen(vlm: VLM, count: int) -> BatchFeature:
    """Pictures for a class that wants some even where no word of the prompt stands for one, so that none is seen."""
    processor: Any = vlm.processor
    made: BatchFeature = processor.image_processor([Image.new("RGB", (8, 8))] * count, return_tensors="pt")
    return made


def check_words(vlm: VLM, texts: Iterable[str]) -> None:
    """Raises InputError if the model's processor would look for a picture, a sound or a film where a text only names
    one.
    """
    named = [getattr(vlm.processor, name, None) for name in PLACEHOLDERS]
    words = [word for word in named if isinstance(word, str) and word]
    for text in texts:
        for word in words:
            if word in text:
                raise InputError(f"{text[:80]!r}: {word} stands for a picture or the like to this model; leave it out")


def positions(batch: BatchFeature) -> torch.Tensor:
    """Returns [batch, positions]: 0, 1, 2 ... from each row's first real token, so that padding moves nothing."""
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
