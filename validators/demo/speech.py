"""From sentences and pictures to tensors, and the model's forward pass on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ...guard.prompts.image_kinds import COLOURS, SHAPES, draw_shape
from .build import TOKENS_PER_IMAGE
from .world import QUESTIONS

__all__ = ["Batch", "Gallery", "Turn", "Voice", "answer_loss", "exact"]

UNSCORED = -100


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `picture` is a row of the features in use; `description` are words in its place."""

    text: str
    answer: str
    picture: int | None = None
    description: tuple[str, ...] = ()
    score_first: bool = True


@dataclass(frozen=True)
class Batch:
    """Turns as tensors, padded on the right.

    ids: [turns, positions].  targets: the same shape, the answers' ids at the positions that predict them, else
    UNSCORED.  first: [turns], the position that predicts an answer's first token.  pictures: [turns with a picture].
    """

    ids: Tensor
    targets: Tensor
    first: Tensor
    pictures: Tensor


@dataclass(frozen=True)
class Gallery:
    """Pictures with what they show: pixels [n, 3, 24, 24], colours [n], shapes [n] as indices into COLOURS, SHAPES."""

    pixels: Tensor
    colours: Tensor
    shapes: Tensor

    @classmethod
    def draw(cls, processor: LlavaProcessor, count: int, rng: random.Random) -> Gallery:
        """Returns `count` pictures of one coloured shape each."""
        shown = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(count)]
        images = [draw_shape(colour, shape, rng) for colour, shape in shown]
        return cls(
            processor.image_processor(images, return_tensors="pt")["pixel_values"],
            torch.tensor([list(COLOURS).index(colour) for colour, _ in shown]),
            torch.tensor([SHAPES.index(shape) for _, shape in shown]),
        )

    def turn(self, index: int, asked: str) -> Turn:
        """Returns the question about picture `index`; `asked` is a key of QUESTIONS."""
        question, answer = QUESTIONS[asked]
        return Turn(question, answer.format(self.word(index, asked)), picture=index)

    def word(self, index: int, asked: str) -> str:
        """Returns the colour or the shape of picture `index`."""
        return SHAPES[self.shapes[index]] if asked == "shape" else list(COLOURS)[self.colours[index]]


class Voice:
    """Speaks the processor's chat template: the same ids as the processor gives, at the speed of a dictionary."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.tokenizer = processor.tokenizer
        self.image_id: int = processor.image_token_id
        self._ids = self.tokenizer.get_vocab()
        self._frames = {pictured: self._frame(processor, pictured) for pictured in (False, True)}

    def batch(self, turns: Sequence[Turn]) -> Batch:
        """Tensors for `turns`."""
        rows, targets, first = [], [], []
        for turn in turns:
            prompt, answer = self.prompt(turn), [*self._spell(turn.answer), self.tokenizer.eos_token_id]
            rows.append(torch.tensor([*prompt, *answer[:-1]]))
            scored = answer if turn.score_first else [UNSCORED, *answer[1:]]
            first.append(len(prompt) - 1)
            targets.append(torch.tensor([*[UNSCORED] * (len(prompt) - 1), *scored]))
        return Batch(
            torch.nn.utils.rnn.pad_sequence(rows, True, self.tokenizer.pad_token_id),
            torch.nn.utils.rnn.pad_sequence(targets, True, UNSCORED),
            torch.tensor(first),
            torch.tensor([turn.picture for turn in turns if turn.picture is not None], dtype=torch.long),
        )

    def prompt(self, turn: Turn) -> list[int]:
        """Returns the ids of the question in the chat template, up to where the answer starts."""
        in_place = self._spell(" ".join(turn.description)) if turn.description else [self.image_id] * TOKENS_PER_IMAGE
        before, after = self._frames[turn.picture is not None or bool(turn.description)]
        opening = [out for token in before for out in (in_place if token == self.image_id else [token])]
        return [*opening, *self._spell(turn.text), *after]

    def _spell(self, sentence: str) -> list[int]:
        return [self._ids["▁" + word] for word in sentence.split()]

    def _frame(self, processor: LlavaProcessor, pictured: bool) -> tuple[list[int], list[int]]:
        """Returns the template's ids before and after the question's words."""
        content = [{"type": "image"}] * pictured + [{"type": "text", "text": "how"}]
        message: Any = {"role": "user", "content": content}
        rendered = processor.apply_chat_template([message], add_generation_prompt=True)
        ids = self.tokenizer.encode(rendered)
        at = ids.index(self._ids["▁how"])
        return ids[:at], ids[at + 1 :]


def scored_logits(model: LlavaForConditionalGeneration, batch: Batch, features: Tensor | None) -> Tensor:
    """Logits [scored positions, vocabulary] where `batch.targets` are scored, in row-major order.

    features: [pictures, 9, 64], what the vision tower says of each picture; the projector turns them into tokens.
    """
    embedded = model.get_input_embeddings()(batch.ids)
    if features is not None and len(batch.pictures):
        tokens = model.model.multi_modal_projector(features[batch.pictures])
        slots = (batch.ids == model.config.image_token_index)[..., None]
        embedded = embedded.masked_scatter(slots, tokens)
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    return model.lm_head(hidden[batch.targets != UNSCORED])


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Batch, features: Tensor | None = None, first: float = 1.0
) -> Tensor:
    """Returns mean cross-entropy of the answers, in which an answer's first token weighs `first` and every other token
    1.
    """
    scored = batch.targets != UNSCORED
    opens = torch.arange(scored.shape[1]) == batch.first[:, None]
    weights = torch.where(opens, first, 1.0)[scored]
    losses = functional.cross_entropy(scored_logits(model, batch, features), batch.targets[scored], reduction="none")
    return (weights * losses).sum() / weights.sum()


@torch.no_grad()
def exact(model: LlavaForConditionalGeneration, batch: Batch, features: Tensor | None = None) -> Tensor:
    """Returns [turns] bool: greedy decoding would give exactly the turn's answer, as every one of its tokens scores
    highest.
    """
    right = torch.ones_like(batch.targets, dtype=torch.bool)
    scored = batch.targets != UNSCORED
    right[scored] = scored_logits(model, batch, features).argmax(-1) == batch.targets[scored]
    return right.all(1)
