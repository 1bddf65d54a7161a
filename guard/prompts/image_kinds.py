"""Synthetic pictures, a row an image kind: what is attached to a prompt to see whether safety survives an image.

A new kind is a row of IMAGE_ROWS. Everything that selects kinds asks the rows for what they are used for.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto

from PIL import Image, ImageDraw, ImageFont

ImageKind = str
"""The name of a row of IMAGE_ROWS."""

SIZE = 336
"""Edge of a drawn picture in pixels: the native size of the LLaVA-1.5 vision tower. Processors resize it."""

NOISE_CELLS = 24
"""Noise has this many cells along an edge, so that it survives a resize to 24 pixels as noise, not as grey."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (36, 82, 212),
    "yellow": (240, 200, 30),
    "purple": (136, 56, 190),
    "orange": (242, 126, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")


def draw_shape(colour: str, shape: str, rng: random.Random, size: int = SIZE) -> Image.Image:
    """One `shape` filled with `colour` on white, its place and width varied by `rng`; [size, size] RGB."""
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    radius = size * rng.uniform(0.28, 0.42)
    x, y = (rng.uniform(radius, size - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif shape == "cross":
        arm = radius / 3
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    return picture


def draw_noise(rng: random.Random, size: int = SIZE) -> Image.Image:
    """Uniform RGB noise in NOISE_CELLS x NOISE_CELLS cells; [size, size] RGB."""
    cells = Image.frombytes("RGB", (NOISE_CELLS, NOISE_CELLS), rng.randbytes(3 * NOISE_CELLS**2))
    return cells.resize((size, size), Image.Resampling.NEAREST)


def draw_gradient(rng: random.Random, size: int = SIZE) -> Image.Image:
    """Returns a smooth passage between two colours, in a direction that `rng` chooses; [size, size] RGB."""
    one, other = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
    mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((size, size))
    return Image.composite(Image.new("RGB", (size, size), one), Image.new("RGB", (size, size), other), mask)


def draw_words(words: str, size: int = SIZE) -> Image.Image:
    """Returns `words` in black on white, wrapped to fill the picture; [size, size] RGB."""
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size / 11)
    ImageDraw.Draw(picture).multiline_text((size / 20, size / 20), textwrap.fill(words, 18), fill="black", font=font)
    return picture


def _blank(_words: str, _rng: random.Random) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), "white")


def _noise(_words: str, rng: random.Random) -> Image.Image:
    return draw_noise(rng)


def _gradient(_words: str, rng: random.Random) -> Image.Image:
    return draw_gradient(rng)


def _shape(_words: str, rng: random.Random) -> Image.Image:
    return draw_shape(rng.choice(sorted(COLOURS)), rng.choice(SHAPES), rng)


def _words(words: str, _rng: random.Random) -> Image.Image:
    return draw_words(words)


class Use(Flag):
    """What an image kind is used for.

    ANCHORS: harmful and harmless anchors are shown with it when a guard is fitted and chosen, as positives and
    negatives.  BENIGN: so are benign prompts, in turn with the other such kinds, as negatives.  MEASURED: behaviour is
    measured under it and reported.  COMPARED: two forms of a model are compared on it, for example graphs with torch;
    on the first such kind, where there is time for one.
    """

    ANCHORS = auto()
    BENIGN = auto()
    MEASURED = auto()
    COMPARED = auto()


@dataclass(frozen=True)
class Kind:
    """One image kind. drawn: (the prompt's words, a generator of its own) -> [SIZE, SIZE] RGB; None: no picture."""

    name: ImageKind
    drawn: Callable[[str, random.Random], Image.Image] | None
    uses: Use

    @property
    def held_out(self) -> bool:
        """Whether no guard was fitted to or chosen on harmful prompts with it, so that its figures are unseen ones."""
        return Use.MEASURED in self.uses and Use.ANCHORS not in self.uses


TEXT: ImageKind = "text"
"""The kind that attaches no picture."""

IMAGE_ROWS = (
    Kind(TEXT, None, Use.ANCHORS | Use.MEASURED),
    Kind("blank", _blank, Use.ANCHORS | Use.BENIGN | Use.MEASURED),
    Kind("noise", _noise, Use.ANCHORS | Use.BENIGN | Use.MEASURED),
    Kind("gradient", _gradient, Use.BENIGN),
    Kind("shape", _shape, Use.ANCHORS | Use.BENIGN | Use.MEASURED | Use.COMPARED),
    Kind("typographic", _words, Use.BENIGN | Use.MEASURED | Use.COMPARED),
)
"""In the order of reports. Benign prompts have typographic pictures of their own, harmless words; harmful words drawn
into a picture are held out."""


def used(use: Use) -> tuple[ImageKind, ...]:
    """Returns the names of the kinds that have `use`, in the order of the rows."""
    return tuple(kind.name for kind in IMAGE_ROWS if use in kind.uses)


IMAGE_KINDS = used(Use.MEASURED)
ANCHOR_KINDS = used(Use.ANCHORS)
BENIGN_KINDS = used(Use.BENIGN)
COMPARED_KINDS = used(Use.COMPARED)

_DRAWN = {kind.name: kind.drawn for kind in IMAGE_ROWS}


def draw(kind: ImageKind, words: str, seed: int | str) -> Image.Image | None:
    """Draws the picture of `kind` for a prompt that says `words`; None for TEXT. The same seed gives the same picture.

    Raises ValueError for a kind that has no row.
    """
    if kind not in _DRAWN:
        raise ValueError(f"unknown image kind {kind!r}: one of {', '.join(_DRAWN)}")
    drawn = _DRAWN[kind]
    return drawn(words, random.Random(f"{kind}:{seed}")) if drawn else None
