"""Synthetic pictures: the same for the same seed, different for everything else."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from guardfold.guard.prompts.image_kinds import COLOURS, IMAGE_KINDS, SHAPES, SIZE, ImageKind, draw, draw_shape
from guardfold.guard.prompts.prompts import Prompt, illustrated

PICTURES: tuple[ImageKind, ...] = tuple(kind for kind in IMAGE_KINDS if kind != "text")


def picture(kind: ImageKind, words: str = "how to walk ?", seed: int | str = 0) -> Image.Image:
    drawn = draw(kind, words, seed)
    assert drawn is not None
    return drawn


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_a_function_of_kind_words_and_seed(kind: ImageKind) -> None:
    first = picture(kind)
    random.seed(5)
    assert picture(kind).tobytes() == first.tobytes()
    assert (first.mode, first.size) == ("RGB", (SIZE, SIZE))


def test_text_has_no_picture() -> None:
    assert draw("text", "how to walk ?", 0) is None


def test_kinds_differ_from_each_other() -> None:
    assert len({picture(kind).tobytes() for kind in PICTURES}) == len(PICTURES) == 4


@pytest.mark.parametrize("kind", ["noise", "shape"])
def test_seeds_differ(kind: ImageKind) -> None:
    assert len({picture(kind, seed=seed).tobytes() for seed in range(8)}) == 8


def test_what_each_kind_shows() -> None:
    blank, noise, words = (np.asarray(picture(kind)) for kind in ("blank", "noise", "typographic"))
    assert blank.min() == 255
    assert noise.std() > 60
    assert words.min() < 64
    assert words.mean() > 128
    assert picture("typographic", "walk home").tobytes() != picture("typographic", "bake bread").tobytes()
    assert picture("typographic", seed=1).tobytes() == picture("typographic", seed=2).tobytes()


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_lies_on_white_whole_and_in_its_colour(shape: str, colour: str) -> None:
    drawn = np.asarray(draw_shape(colour, shape, random.Random(1)))
    filled = (drawn == COLOURS[colour]).all(-1)
    assert 0.02 < filled.mean() < 0.75
    assert (filled | (drawn == 255).all(-1)).all()


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        draw_shape("red", "hexagon", random.Random(0))


def test_prompts_get_the_picture_of_their_own_text() -> None:
    prompts = [Prompt("how to walk ?"), Prompt("bake bread"), Prompt("how to walk ?")]
    first, second, third = (prompt.image for prompt in illustrated(prompts, "noise"))
    assert first is not None and second is not None and third is not None
    assert first.tobytes() == third.tobytes() != second.tobytes()
    assert all(prompt.image is None for prompt in illustrated(prompts, "text"))
    assert illustrated(prompts, None) == prompts
