"""Prompts with answers, read position by position: MLP inputs by the place they stand at, and logits over answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from ..base.errors import InputError
from ..base.progress import batched
from ..model.greedy import most_likely
from ..model.roles import decoder_layers, mlp_parts, skipped_on_text
from ..model.vlm import VLM, image_token_of
from ..prompts.image_kinds import TEXT, ImageKind
from ..prompts.prompts import Prompt, at_once, encode, illustrated
from .states import forward


class Place(IntEnum):
    """What a position holds."""

    TEXT = 0
    IMAGE = 1
    LAST = 2
    """The last prompt token, where the answer is decided."""
    ANSWER = 3


@dataclass(frozen=True)
class Transcripts:
    """Prompts of one image kind (None: as they are) with the answers that follow them, as token ids."""

    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]
    kind: ImageKind | None = None

    def under(self, kind: ImageKind) -> Transcripts:
        """Returns the same prompts and answers with pictures of `kind`."""
        return Transcripts(self.prompts, self.answers, kind)

    @property
    def pictured(self) -> bool:
        """Whether they come with pictures, of a kind or their own."""
        return self.kind not in (None, TEXT) or any(prompt.image for prompt in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


@torch.inference_mode()
def answer(
    vlm: VLM, prompts: Sequence[Prompt], what: str, kind: ImageKind | None = None, tokens: int = 24
) -> Transcripts:
    """Returns `prompts` with the model's own greedy answers, up to `tokens` each, cut after the end of sequence."""
    model: Any = vlm.model
    answers: list[tuple[int, ...]] = []
    for batch in batched(prompts, at_once(vlm, prompts), what):
        inputs = encode(vlm, illustrated(batch, kind))
        made = most_likely(model, inputs, tokens, suppress_tokens=_never_said(model))
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += [tuple(_until_end(vlm, row)) for row in new.tolist()]
    return Transcripts(tuple(prompts), tuple(answers), kind)


def _until_end(vlm: VLM, row: Sequence[int]) -> Iterator[int]:
    ends = vlm.model.generation_config.eos_token_id
    for token in row:
        yield token
        if token == ends or (isinstance(ends, list) and token in ends):
            return


def _never_said(model: Any) -> list[int] | None:
    """Returns the word that stands for an image feature, which is no word of an answer."""
    token = image_token_of(model.config)
    return None if token < 0 else [token]


@dataclass(frozen=True)
class Page:
    """One batch of transcripts as model inputs: [batch, positions], prompts padded left, answers right of `start`."""

    inputs: BatchFeature
    start: int

    def places(self, image_token: int) -> Tensor:
        """Returns [batch, positions] of Place; -1 where there is padding."""
        ids, mask = self.inputs["input_ids"], self.inputs["attention_mask"].bool()
        places = torch.full_like(ids, Place.TEXT)
        places[ids == image_token] = Place.IMAGE
        places[:, self.start - 1] = Place.LAST
        places[:, self.start :] = Place.ANSWER
        return places.masked_fill(~mask, -1)


def pages(vlm: VLM, transcripts: Transcripts, what: str) -> Iterator[Page]:
    """Returns the transcripts in batches, under a progress bar named `what`."""
    pad, image_token = vlm.processor.tokenizer.pad_token_id, image_token_of(vlm.model.config)
    for rows in batched(range(len(transcripts)), at_once(vlm, transcripts.prompts), what):
        batch = encode(vlm, illustrated([transcripts.prompts[row] for row in rows], transcripts.kind))
        answers = [torch.tensor(transcripts.answers[row], dtype=torch.long) for row in rows]
        answers = [each.masked_fill(each == image_token, pad) for each in answers]  # a picture's place needs a picture
        tail = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=pad).to(vlm.device)
        held = torch.nn.utils.rnn.pad_sequence([torch.ones_like(a) for a in answers], batch_first=True).to(vlm.device)
        size, count = batch["input_ids"].shape, tail.shape[1]
        kind = ANSWER_TYPES.get(vlm.model.config.model_type, 0)
        aligned = {name: each for name, each in batch.items() if name.endswith(ALIGNED) and each.shape[:2] == size}
        more = {name: _continued(name, each, count, kind) for name, each in aligned.items()}
        for name, part in (more | {"input_ids": tail, "attention_mask": held}).items():
            batch[name] = torch.cat([batch[name], part], dim=1)
        yield Page(batch, size[1])


ALIGNED = ("token_type_ids", "cross_attention_mask", "image_attention_mask")
"""Ends of the names of what comes with every word of a prompt: its type, and which pictures it sees."""

ANSWER_TYPES = {"paligemma": 1}
"""Outer model type -> what token_type_ids say of an answer: that it sees only what is before it; 0 elsewhere."""


def _continued(name: str, each: Tensor, count: int, kind: int) -> Tensor:
    """Returns what comes with `count` words after a prompt's, [batch, positions, ...]: they see the pictures that the
    last of the prompt sees.
    """
    last = each[:, -1:].expand(-1, count, *each.shape[2:])
    return last if name.endswith("mask") else torch.full_like(last, kind if name == "token_type_ids" else 0)


@dataclass(frozen=True)
class Readings:
    """What the MLP of one layer read: x [positions, d] float32 on the CPU, and the Place of each, [positions]."""

    x: Tensor
    places: Tensor

    def at(self, place: Place) -> Tensor:
        """Returns the readings at one kind of place, [n, d]."""
        return self.x[self.places == place]

    def but(self, place: Place) -> Readings:
        """Returns the readings everywhere else."""
        kept = self.places != place
        return Readings(self.x[kept], self.places[kept])

    def head(self, count: int) -> Readings:
        """Returns up to `count` readings at each kind of place, drawn at random but always the same ones."""
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(0))
        kept = torch.cat([order[self.places[order] == place][:count] for place in Place])
        return Readings(self.x[kept], self.places[kept])

    @classmethod
    def join(cls, parts: Sequence[Readings]) -> Readings:
        """Returns all of them, one after another."""
        return cls(torch.cat([part.x for part in parts]), torch.cat([part.places for part in parts]))


@dataclass
class Usage:
    """How active each neuron of a layer's MLP is: the sum of |a_j| over the positions seen."""

    total: Tensor | None = None
    positions: int = 0

    def add(self, activations: Tensor) -> None:
        """Takes in activations [positions, neurons]."""
        self.total = activations.abs().sum(0) + (0 if self.total is None else self.total)
        self.positions += len(activations)

    def importance(self, down: Tensor) -> Tensor:
        """E|a_j| |down[:, j]|, [neurons]: how much each writes.  down: [d, neurons]."""
        assert self.total is not None, "no positions seen"
        return self.total / self.positions * down.detach().float().cpu().norm(dim=0)


PER_SEQUENCE = 24
"""Text positions, and image positions, kept of each sequence at most: an image has hundreds that are much alike."""


@contextmanager
def _watching(
    vlm: VLM, layers: Sequence[int], seen: dict[int, Tensor], used: dict[int, Tensor], neurons: bool
) -> Iterator[None]:
    handles = []
    every = decoder_layers(vlm.model)
    for layer in layers:
        parts = mlp_parts(every[layer])
        for module, into in ((parts.down if neurons else parts.gate, seen), (parts.down, used)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _module, args, into=into, layer=layer: into.__setitem__(layer, args[0].float())
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def read(
    vlm: VLM,
    transcripts: Transcripts,
    layers: Sequence[int],
    what: str,
    usage: dict[int, Usage] | None = None,
    neurons: bool = False,
) -> dict[int, Readings]:
    """Returns layer -> what its MLP read along the transcripts (with `neurons`, what its output matrix did, [positions,
    neurons]); `usage` (layer -> Usage) is added to where it is given.

    All last and answer positions are kept, of text and image positions PER_SEQUENCE each per sequence, the same ones in
    every run.  Raises InputError for a layer that does not run without pictures, where there are none.
    """
    if unread := set() if transcripts.pictured else skipped_on_text(vlm.model) & set(layers):
        raise InputError(f"layer {min(unread)}: does not run without a picture, so its MLP reads nothing of a text")
    draw = torch.Generator().manual_seed(0)
    parts: dict[int, list[Readings]] = {layer: [] for layer in layers}
    seen: dict[int, Tensor] = {}
    used: dict[int, Tensor] = {}
    image_token = image_token_of(vlm.model.config)
    with _watching(vlm, layers, seen, used, neurons):
        for page in pages(vlm, transcripts, what):
            places = page.places(image_token)
            forward(vlm.model.base_model, page.inputs, use_cache=False)
            kept = _sample(places.cpu(), draw)
            for layer in layers:
                x = seen[layer].unflatten(0, (len(places), -1)) if seen[layer].ndim == 2 else seen[layer]
                parts[layer].append(Readings(x.cpu()[kept], places.cpu()[kept]))
                if usage is not None:
                    usage.setdefault(layer, Usage()).add(used[layer].flatten(0, -2)[places.flatten() >= 0].cpu())
    return {layer: Readings.join(part) for layer, part in parts.items()}


def last_readings(
    vlm: VLM, prompts: Sequence[Prompt], kind: ImageKind, layer: int, what: str, neurons: bool = False
) -> Tensor:
    """Returns what the MLP of `layer` reads at the last token of each prompt under `kind`, [len(prompts), d]; with
    `neurons`, its neurons there, [len(prompts), neurons].
    """
    silent = Transcripts(tuple(prompts), ((),) * len(prompts), kind)
    return read(vlm, silent, [layer], what, neurons=neurons)[layer].at(Place.LAST)


def _sample(places: Tensor, draw: torch.Generator) -> Tensor:
    """Returns [batch, positions] bool: which positions to keep."""
    chance = torch.rand(places.shape, generator=draw)
    kept = (places == Place.LAST) | (places == Place.ANSWER)
    for place in (Place.TEXT, Place.IMAGE):
        order = chance.masked_fill(places != place, 2.0).argsort(dim=1).argsort(dim=1)
        kept |= (places == place) & (order < PER_SEQUENCE)
    return kept


@torch.inference_mode()
def answer_logits(model: Any, page: Page) -> Tensor:
    """Returns [answer tokens of the batch, vocabulary], float32: what the model predicts where each answer token
    stands.
    """
    length = page.inputs["input_ids"].shape[1]
    kept = torch.arange(page.start - 1, length - 1, device=page.inputs["input_ids"].device)
    logits = forward(model, page.inputs, use_cache=False, logits_to_keep=kept).logits
    return logits[page.inputs["attention_mask"][:, page.start :].bool()].float()
