"""Synthetic pictures, one per image kind: what is attached to a prompt to see whether safety survives an image."""

from __future__ import annotations

import random
import textwrap
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageFont

ImageKind = Literal["text", "blank", "noise", "shape", "typographic"]
IMAGE_KINDS: tuple[ImageKind, ...] = get_args(ImageKind)
"""`text` attaches no image at all; the others are pictures, in the order in which reports show them."""

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
    """A smooth passage between two colours, in a direction that `rng` chooses; [size, size] RGB."""
    one, other = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
    mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize((size, size))
    return Image.composite(Image.new("RGB", (size, size), one), Image.new("RGB", (size, size), other), mask)


def draw_words(words: str, size: int = SIZE) -> Image.Image:
    """`words` in black on white, wrapped to fill the picture; [size, size] RGB."""
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size / 11)
    ImageDraw.Draw(picture).multiline_text((size / 20, size / 20), textwrap.fill(words, 18), fill="black", font=font)
    return picture


def draw(kind: ImageKind | Literal["gradient"], words: str, seed: int | str) -> Image.Image | None:
    """The picture of `kind` for a prompt that says `words`; None for `text`. The same seed gives the same picture."""
    rng = random.Random(f"{kind}:{seed}")
    if kind == "text":
        return None
    if kind == "blank":
        return Image.new("RGB", (SIZE, SIZE), "white")
    if kind == "noise":
        return draw_noise(rng)
    if kind == "gradient":
        return draw_gradient(rng)
    if kind == "shape":
        return draw_shape(rng.choice(sorted(COLOURS)), rng.choice(SHAPES), rng)
    return draw_words(words)
