"""The last token of every prompt, where an answer is decided: what the MLPs read there, and how the model then begins.

One pass a prompt and a few words of its answer, so thousands of prompts are affordable; `examples` reads every position
of few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..base.progress import batched
from ..model.greedy import most_likely
from ..model.roles import decoder_layers, mlp_parts, output_tensor
from ..model.vlm import VLM
from ..prompts.image_kinds import TEXT, ImageKind
from ..prompts.prompts import Prompt, at_once, encode, illustrated

Group = Literal["harmful", "harmless", "benign", "near"]
"""harmful and harmless: the two sides of anchor pairs.  benign: natural prompts.  near: near misses."""

FIRST_WORDS = 6
"""Tokens of an answer that show whether it begins as a refusal."""


@dataclass(frozen=True)
class Asked:
    """A prompt to be read: its group, the kind of picture it comes with (None: its own), the fold it is scored in."""

    prompt: Prompt
    group: Group
    kind: ImageKind | None
    fold: int

    @property
    def pictured(self) -> bool:
        return self.kind not in (None, TEXT) or self.prompt.image is not None

    def shown(self) -> Prompt:
        """Returns the prompt with its picture, drawn now: a thousand are a third of a gigabyte."""
        return illustrated([self.prompt], self.kind)[0]


@dataclass(frozen=True)
class LastTokens:
    """What stands at the last tokens of `asked`, row by row.

    x: layer -> [n, d], what its MLP reads.  h: layer -> [n, d], the stream after it.  Float32 on the CPU.  refused:
    [n] bool, whether the model's answer begins as a refusal.
    """

    asked: tuple[Asked, ...]
    x: dict[int, Tensor]
    h: dict[int, Tensor]
    refused: Tensor

    def rows(self, group: Group, kind: ImageKind | None = None) -> Tensor:
        """Returns which rows are of `group` (and under `kind`): [n] bool."""
        return torch.tensor([each.group == group and kind in (None, each.kind) for each in self.asked])

    @property
    def folds(self) -> Tensor:
        return torch.tensor([each.fold for each in self.asked])


@torch.no_grad()
def read_last(
    vlm: VLM, asked: Sequence[Asked], layers: Sequence[int], refuses: Callable[[str], bool], what: str
) -> LastTokens:
    """Returns what stands at the last tokens of `asked`, under a progress bar named `what`.

    refuses: whether an answer of which the first words are given begins as a refusal.
    """
    order = sorted(range(len(asked)), key=lambda row: (asked[row].pictured, len(asked[row].prompt.text)))
    x: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    h: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    refused: list[bool] = []
    for rows in _batches(vlm, asked, order, what):
        inputs = encode(vlm, [asked[row].shown() for row in rows])
        with _watching(vlm, layers, len(rows)) as (read, written):
            made = most_likely(vlm.model, inputs, FIRST_WORDS)
        new = made[:, inputs["input_ids"].shape[1] :]
        refused += [refuses(text.strip()) for text in vlm.processor.batch_decode(new, skip_special_tokens=True)]
        for layer in layers:
            x[layer].append(read[layer])
            h[layer].append(written[layer])
    back = torch.tensor(order).argsort()
    return LastTokens(
        tuple(asked),
        {layer: torch.cat(each)[back] for layer, each in x.items()},
        {layer: torch.cat(each)[back] for layer, each in h.items()},
        torch.tensor(refused)[back],
    )


def _batches(vlm: VLM, asked: Sequence[Asked], order: Sequence[int], what: str) -> Iterator[Sequence[int]]:
    """Rows in batches: all with pictures or none, and of about one length, so that little is padding."""
    for pictured in (False, True):
        rows = [row for row in order if asked[row].pictured == pictured]
        yield from batched(rows, at_once(vlm, [asked[row].prompt for row in rows]), what)


@contextmanager
def _watching(vlm: VLM, layers: Sequence[int], size: int) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """What MLPs read and what layers leave in the stream at the last position of the first pass, [size, d] a layer; the
    passes after it are the answer's.
    """
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], layer: int, states: Tensor) -> None:
        if layer not in into:
            into[layer] = states.reshape(size, -1, states.shape[-1])[:, -1].float().cpu()

    handles = []
    for layer in layers:
        module = decoder_layers(vlm.model)[layer]
        handles += [
            mlp_parts(module).gate.register_forward_pre_hook(lambda _m, args, at=layer: keep(read, at, args[0])),
            module.register_forward_hook(lambda _m, _args, out, at=layer: keep(written, at, output_tensor(out))),
        ]
    try:
        yield read, written
    finally:
        for handle in handles:
            handle.remove()
