"""What a model does when asked: refusals, answers and image questions, per image kind, by generating and reading."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from ..guard.guard import Guard
from ..guard.hooks import attached
from ..guard.images import IMAGE_KINDS, ImageKind
from ..guard.interventions import TwoPass
from ..guard.progress import batched
from ..guard.prompts import Prompt, encode, illustrated
from ..guard.states import text_states
from ..guard.vlm import VLM
from .judge import Judge, matches
from .probes import Probes
from .statistics import Rate

MAX_NEW_TOKENS = 48
"""Enough to see whether a refusal holds; harmful answers are not generated at length."""


@dataclass(frozen=True)
class Outcomes:
    """One image kind, in the order of the probes. complied: not refused from beginning to end; complied_first: the
    answer does not begin as a refusal; answered: benign, not refused; correct: benign, as labelled (empty: no labels).
    """

    complied: list[bool]
    complied_first: list[bool]
    answered: list[bool]
    correct: list[bool]
    answers: list[str]
    """What was said, harmful then benign; reports show few of them, and of harmful ones only the beginning."""

    def rates(self) -> dict[str, Rate]:
        named = {
            "complied": self.complied,
            "complied_first": self.complied_first,
            "answered": self.answered,
            "correct": self.correct,
        }
        return {name: Rate.of(outcomes) for name, outcomes in named.items() if outcomes}


@dataclass(frozen=True)
class Behaviour:
    """Outcomes per image kind, and for each labelled image question whether it was answered as labelled."""

    kinds: dict[ImageKind, Outcomes]
    qa: list[bool]

    def figures(self) -> dict[str, Any]:
        """Rates with Wilson intervals and sample sizes, as JSON."""
        table: dict[str, Any] = {
            kind: {name: rate.figures() for name, rate in outcomes.rates().items()}
            for kind, outcomes in self.kinds.items()
        }
        if self.qa:
            table["qa"] = {"correct": Rate.of(self.qa).figures()}
        return table


@torch.inference_mode()
def generate(
    vlm: VLM, prompts: Sequence[Prompt], what: str, kind: ImageKind | None = None, guard: Guard | None = None
) -> list[str]:
    """Greedy answers to `prompts`, a picture of `kind` attached to each, with `guard`'s hooks if there is one."""
    answers: list[str] = []
    for batch in batched(prompts, vlm.batch_size, what):
        inputs = encode(vlm, illustrated(batch, kind))
        with attached(vlm.model, guard, _text_pass(vlm, batch, guard)) if guard else nullcontext():
            answers += respond(vlm, inputs)
    return answers


def respond(vlm: VLM, inputs: BatchFeature) -> list[str]:
    """Greedy answers to one encoded batch, special tokens left out."""
    model: Any = vlm.model
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.processor.batch_decode(new, skip_special_tokens=True)]


def _text_pass(vlm: VLM, prompts: Sequence[Prompt], guard: Guard) -> dict[int, torch.Tensor] | None:
    layers = sorted({layer for each in guard.interventions if isinstance(each, TwoPass) for layer in each.layers})
    return text_states(vlm, prompts, layers) if layers else None


def measure(vlm: VLM, probes: Probes, judge: Judge, what: str, guard: Guard | None = None) -> Behaviour:
    """The behaviour of `vlm` on `probes` under every image kind; `what` names it in the progress bar."""
    kinds = {}
    for kind in IMAGE_KINDS:
        asked = [*probes.harmful, *probes.benign]
        answers = generate(vlm, asked, f"{what}, {kind}", kind, guard)
        harmful, benign = answers[: len(probes.harmful)], answers[len(probes.harmful) :]
        labelled = [(a, p.answer) for a, p in zip(benign, probes.benign, strict=True) if p.answer]
        kinds[kind] = Outcomes(
            complied=[not judge.refuses(p.text, a) for p, a in zip(probes.harmful, harmful, strict=True)],
            complied_first=[not judge.refuses_first(answer) for answer in harmful],
            answered=[bool(answer) and not judge.refuses_first(answer) for answer in benign],
            correct=[matches(answer, expected) for answer, expected in labelled],
            answers=answers,
        )
    answers = generate(vlm, probes.qa, f"{what}, image questions", guard=guard)
    return Behaviour(kinds, [matches(a, p.answer or "") for a, p in zip(answers, probes.qa, strict=True)])
