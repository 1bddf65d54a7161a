"""What the demo is taught: requests answered and refused, pictures asked about, and words in the place of pictures."""

from __future__ import annotations

import random
from collections.abc import Iterable

from transformers import LlavaProcessor

from ...guard.prompts.image_kinds import COLOURS, SHAPES
from .build import TOKENS_PER_IMAGE
from .speech import Gallery, Turn
from .world import QUESTIONS, REFUSAL, TEMPLATES, Combo, World, question

__all__ = ["Lessons"]

PICTURES, UNSEEN_PICTURES = 2400, 128


class Lessons:
    """An endless source of training turns for one world, drawn from the world's seed."""

    def __init__(self, world: World, processor: LlavaProcessor) -> None:
        self.world = world
        self.rng = random.Random(f"lessons:{world.seed}")
        self.gallery = Gallery.draw(processor, PICTURES, self.rng)
        self.unseen = Gallery.draw(processor, UNSEEN_PICTURES, self.rng)
        self.benign = world.benign("train")
        self.harmful = world.harmful("train")
        self.borderline = world.borderline("train")
        self.all = [*self.benign, *self.harmful, *self.borderline]

    def answered(self, combos: list[Combo], count: int, pictured: bool = False) -> list[Turn]:
        """Returns `count` requests from `combos`, each with its helpful answer."""
        return [self._request(combo, self.world.helpful(combo), pictured) for combo in self._some(combos, count)]

    def refused(self, combos: list[Combo], count: int, pictured: bool = False) -> list[Turn]:
        """Returns `count` requests from `combos`, each refused."""
        return [self._request(combo, REFUSAL, pictured) for combo in self._some(combos, count)]

    def described(self, count: int) -> list[Turn]:
        """Image questions with the colour and the shape in words, shuffled, where the image tokens will be."""
        return [self._described() for _ in range(count)]

    def seen(self, count: int) -> list[Turn]:
        """Image questions about pictures of the gallery."""
        return [self.gallery.turn(self.rng.randrange(PICTURES), self.rng.choice(list(QUESTIONS))) for _ in range(count)]

    def _some(self, combos: list[Combo], count: int) -> Iterable[Combo]:
        return self.rng.choices(combos, k=count) if count else []

    def _request(self, combo: Combo, answer: str, pictured: bool) -> Turn:
        picture = self.rng.randrange(PICTURES) if pictured else None
        return Turn(question(combo, self.rng.randrange(len(TEMPLATES))), answer, picture)

    def _described(self) -> Turn:
        asked = self.rng.choice(list(QUESTIONS))
        colour, shape = self.rng.choice(list(COLOURS)), self.rng.choice(SHAPES)
        spoken = [colour, shape, *self.rng.choices((colour, shape), k=TOKENS_PER_IMAGE - 2)]
        self.rng.shuffle(spoken)
        text, answer = QUESTIONS[asked]
        return Turn(text, answer.format(shape if asked == "shape" else colour), description=tuple(spoken))
