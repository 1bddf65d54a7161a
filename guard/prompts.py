"""Prompts as a model sees them: anchor pairs, files of prompts, image kinds, chat template, left-padded batches."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature

from .errors import InputError
from .images import ImageKind, draw
from .processing import encoded
from .untrusted import open_given, open_regular, parse_object, read_given
from .vlm import VLM

BUILT_IN_ANCHORS = Path(str(files("guardfold.guard") / "data" / "anchors.jsonl"))
MAX_ROW_BYTES = 2**16
MAX_FILE_BYTES = 256 * 2**20
MAX_ROWS = 100_000
MAX_LINES = 2**22
"""Blank ones too, and those within a row of CSV."""

MAX_TEXT = 2**13
"""Characters of one text: what a model takes for a text grows with its square."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Pictures that are opened. Of others that Pillow knows some are programs for other programs (EPS)."""

MAX_PICTURE_BYTES = 64 * 2**20
MAX_PIXELS = 2**25
MAX_EDGE = 2**14
MAX_ASPECT = 100
"""Above any photograph or page, below what image processors make gigabytes of."""

MAX_PIXELS_TOGETHER = 2**28
"""In three bytes each."""

MAX_PIXELS_AT_ONCE = 2**26
"""Of one batch: image processors need some forty bytes each."""

PLACEHOLDERS = ("image_token", "boi_token", "video_token", "audio_token")
"""What processors call the words in whose place they put something else."""

Item = TypeVar("Item")


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
    found = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    yield from limited(path, found)


def limited(path: Path, found: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Item]]:
    """`found`, (line number, what is there) of the file `path`. InputError if there are more than a file may have."""
    for count, (number, item) in enumerate(found, start=1):
        if count > MAX_ROWS:
            raise InputError(f"{path}, line {number}: over {MAX_ROWS} rows; leave some out")
        yield number, item


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines(path):
        if line.strip():
            yield number, parse_object(line.encode(), f"{path}, line {number}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a CSV file. A row may go over several lines, together no longer than one may be."""
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for number, line in lines(path):
            taken += len(line)
            _check_length(taken, MAX_ROW_BYTES, f"{path}, line {number}")
            yield line

    reader = csv.DictReader(counted())
    try:
        for row in reader:
            yield reader.line_num, row
            taken = 0
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of a text file, none of them read further than one may be long. InputError otherwise."""
    descriptor = open_given(path)
    with os.fdopen(descriptor, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their CSV with a mark
        if os.fstat(descriptor).st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        try:
            for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), ""), start=1):
                _check_length(len(line), MAX_ROW_BYTES, f"{path}, line {number}")
                if number > MAX_LINES:
                    raise InputError(f"{path}: over {MAX_LINES} lines")
                yield number, line
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error})") from error


def field(path: Path, number: int, row: dict[str, Any], name: str) -> str:
    """The text `row[name]`. InputError naming file, line and column if there is none, or none that a model is asked."""
    return text_of(row, name, f"{path}, line {number}")


def text_of(row: dict[str, Any], name: str, where: str) -> str:
    """The text `row[name]`. InputError that begins with `where` if there is none, or none that a model is asked."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name!r} is missing or not text")
    return sound_text(value, f"{where}: {name!r}")


def sound_text(text: str, where: str) -> str:
    """`text` without the blanks around it. InputError if it is too long to be asked, or is none in UTF-8."""
    text = text.strip()
    _check_length(len(text), MAX_TEXT, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not text ({error.reason})") from error
    return text


def _check_length(length: int, limit: int, where: str) -> None:
    if length > limit:
        raise InputError(f"{where}: longer than {limit} characters")


def beside(folder: Path, name: str) -> Path | None:
    """The file `name` that a model folder brings for its own measurement, if it does. InputError if it is no regular
    file of that folder.
    """
    if not os.path.lexists(folder / name):
        return None
    os.close(open_regular(folder, name))
    return folder / name


def load_anchors(path: Path = BUILT_IN_ANCHORS) -> Anchors:
    """Anchor pairs from JSONL or CSV with `harmful` and `harmless` columns. InputError naming the line if malformed."""
    pairs = [(field(path, n, row, "harmful"), field(path, n, row, "harmless")) for n, row in rows(path)]
    if not pairs:
        raise InputError(f"{path}: no anchor pairs")
    harmful, harmless = zip(*pairs, strict=True)
    return Anchors(harmful, harmless)


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` inside `folder`; InputError if it leads outside or is none."""
    try:
        os.close(open_regular(folder, name))
    except InputError as error:
        raise InputError(f"{where}: {name[:256]!r} is not a file inside {folder}") from error
    return (folder / name).resolve()


def load_image(folder: Path, name: str, where: str) -> Image.Image:
    """The picture `name` inside `folder`; InputError if it leads outside or is no picture."""
    return open_image(inside(folder, name, where), f"{where}: {name!r}")


class Pictures:
    """Pictures of one folder, for as long as one file of prompts is read: each decoded once, however often it is named.

    All together they have at most MAX_PIXELS_TOGETHER.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[Path, Image.Image] = {}
        self.pixels = 0

    def load(self, name: str, where: str) -> Image.Image:
        """As `load_image`. InputError also if this picture is one too many."""
        path = inside(self.folder, name, where)
        if path not in self.held:
            picture = self.held[path] = open_image(path, f"{where}: {name!r}")
            self.pixels += picture.width * picture.height
            if self.pixels > MAX_PIXELS_TOGETHER:
                raise InputError(
                    f"{where}: the pictures up to here have over {MAX_PIXELS_TOGETHER} pixels; shrink them"
                )
        return self.held[path]


def open_image(path: Path, what: str) -> Image.Image:
    """The picture in `path`; InputError if it is none, or larger than it need be. What is larger is not decoded."""
    data = read_given(path, MAX_PICTURE_BYTES)
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of pictures that are taken or refused here
            picture = Image.open(BytesIO(data), formats=FORMATS)
            _check_size(*picture.size, what)
            return picture.convert("RGB")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{what} is not a readable picture (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # foreign files can break a decoder in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} is not a readable picture ({reason})") from error


def _check_size(width: int, height: int, what: str) -> None:
    short, long = sorted((width, height))
    if long > MAX_EDGE or width * height > MAX_PIXELS or long > MAX_ASPECT * short:
        raise InputError(
            f"{what} is a picture of {width} x {height} pixels; at most {MAX_PIXELS} in all, {MAX_EDGE} along an edge "
            f"and {MAX_ASPECT} times as long as wide are taken"
        )


def illustrated(prompts: Iterable[Prompt], kind: ImageKind | None) -> list[Prompt]:
    """The same prompts with a picture of `kind` attached to each, always the same one for the same text; as they are
    for None. Do this batch by batch: a thousand pictures are a third of a gigabyte."""
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


def _conversation(prompt: Prompt) -> list[dict[str, Any]]:
    image = [] if prompt.image is None else [{"type": "image", "image": prompt.image}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": prompt.text}]}]


def encode(vlm: VLM, prompts: Sequence[Prompt]) -> BatchFeature:
    """Model inputs for `prompts` in the model's chat template, up to where its answer begins; on the model's device.

    input_ids, attention_mask: [batch, positions], padded on the left, so that position -1 is the last prompt token of
    every row.  pixel_values where there are images, in the model's dtype, and whatever else its class takes.  All or
    none of `prompts` have an image.  InputError for a text with a word that stands for a picture.
    """
    check_words(vlm, (prompt.text for prompt in prompts))
    conversations: Any = [_conversation(prompt) for prompt in prompts]
    batch = encoded(vlm.processor, conversations, vlm.folder)
    if "token_type_ids" not in inspect.signature(vlm.model.forward).parameters:
        batch.pop("token_type_ids", None)
    return batch.to(vlm.device, dtype=vlm.model.dtype)


def check_words(vlm: VLM, texts: Iterable[str]) -> None:
    """InputError if the model's processor would look for a picture, a sound or a film where a text only names one."""
    named = [getattr(vlm.processor, name, None) for name in PLACEHOLDERS]
    words = [word for word in named if isinstance(word, str) and word]
    for text in texts:
        for word in words:
            if word in text:
                raise InputError(f"{text[:80]!r}: {word} stands for a picture or the like to this model; leave it out")


def positions(batch: BatchFeature) -> torch.Tensor:
    """[batch, positions]: 0, 1, 2 ... from each row's first real token, so that padding moves nothing."""
    return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
