"""Prompts as a model sees them: anchor pairs, files of prompts, image kinds, chat template, left-padded batches."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from .errors import InputError
from .images import ImageKind, draw
from .processing import encoded
from .vlm import VLM

BUILT_IN_ANCHORS = Path(str(files("guardfold.guard") / "data" / "anchors.jsonl"))
MAX_ROW_BYTES = 2**16
MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prompt:
    """One user turn: `text`, an image if there is one, and the expected answer where a file says it."""

    text: str
    image: Image.Image | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Anchors:
    """N paired queries: harmful[i] and harmless[i] differ in harm and as little else as possible."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.harmful)

    def head(self, count: int) -> Anchors:
        """The first `count` pairs."""
        return Anchors(self.harmful[:count], self.harmless[:count])

    @property
    def hash(self) -> str:
        """SHA-256 over the pairs in order, hexadecimal."""
        return hashlib.sha256(json.dumps([self.harmful, self.harmless]).encode()).hexdigest()


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a JSONL or CSV file. InputError, naming the line, for what is not a row."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their CSV with a mark
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if len(line) > MAX_ROW_BYTES:
                    raise InputError(f"{path}, line {number}: longer than {MAX_ROW_BYTES} characters")
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number}: not a JSON object")
                yield number, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not UTF-8 text in JSONL or CSV ({error})") from error


def field(path: Path, number: int, row: dict[str, Any], name: str) -> str:
    """The non-empty string `row[name]`; InputError naming file, line and column otherwise."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}, line {number}: {name!r} is missing or not text")
    return value.strip()


def beside(folder: Path, name: str) -> Path | None:
    """The file `name` that a model folder brings for its own measurement, if it does."""
    return folder / name if (folder / name).is_file() else None


def load_anchors(path: Path = BUILT_IN_ANCHORS) -> Anchors:
    """Anchor pairs from JSONL or CSV with `harmful` and `harmless` columns. InputError naming the line if malformed."""
    pairs = [(field(path, n, row, "harmful"), field(path, n, row, "harmless")) for n, row in rows(path)]
    if not pairs:
        raise InputError(f"{path}: no anchor pairs")
    harmful, harmless = zip(*pairs, strict=True)
    return Anchors(harmful, harmless)


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` inside `folder`; InputError if it leads outside or is none."""
    path = (folder / name.replace("\0", "?")).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise InputError(f"{where}: {name!r} is not a file inside {folder}")
    return path


def load_image(folder: Path, name: str, where: str) -> Image.Image:
    """The picture `name` inside `folder`; InputError if it leads outside or is no picture."""
    return open_image(inside(folder, name, where), f"{where}: {name!r}")


def open_image(path: Path, what: str) -> Image.Image:
    """The picture in `path`; InputError if it is none."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{what} is not a readable picture ({error})") from error


def illustrated(prompts: Iterable[Prompt], kind: ImageKind | None) -> list[Prompt]:
    """The same prompts with a picture of `kind` attached to each, always the same one for the same text; as they are
    for None. Do this batch by batch: a thousand pictures are a third of a gigabyte."""
    if kind is None:
        return list(prompts)
    return [replace(prompt, image=draw(kind, prompt.text, prompt.text)) for prompt in prompts]


def _conversation(prompt: Prompt) -> list[dict[str, Any]]:
    image = [] if prompt.image is None else [{"type": "image", "image": prompt.image}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": prompt.text}]}]


def encode(vlm: VLM, prompts: Sequence[Prompt]) -> BatchFeature:
    """Model inputs for `prompts` in the model's chat template, up to where its answer begins; on the model's device.

    input_ids, attention_mask: [batch, positions], padded on the left, so that position -1 is the last prompt token of
    every row.  pixel_values where there are images, in the model's dtype, and whatever else its class takes.  All or
    none of `prompts` have an image.
    """
    conversations: Any = [_conversation(prompt) for prompt in prompts]
    batch = encoded(vlm.processor, conversations, vlm.folder)
    if "token_type_ids" not in inspect.signature(vlm.model.forward).parameters:
        batch.pop("token_type_ids", None)
    return batch.to(vlm.device, dtype=vlm.model.dtype)


def positions(batch: BatchFeature) -> torch.Tensor:
    """[batch, positions]: 0, 1, 2 ... from each row's first real token, so that padding moves nothing."""
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
