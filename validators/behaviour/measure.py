"""What a model does when asked: refusals, answers and image questions, per image kind, by generating and reading."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from transformers import BatchFeature

from ...guard.base.progress import batched
from ...guard.fitting.states import text_states
from ...guard.guard import Guard
from ...guard.hooks import attached
from ...guard.model.greedy import most_likely
from ...guard.model.vlm import VLM
from ...guard.prompts.image_files import MAX_PIXELS_AT_ONCE
from ...guard.prompts.image_kinds import IMAGE_KINDS, ImageKind
from ...guard.prompts.prompts import Prompt, at_once, check_words, encode, illustrated, pixels
from .benchmarks import Pictured
from .coherence import says_something
from .evaluation_prompts import EvaluationPrompts
from .judge import Judge, matches, mentions
from .statistics import Rate

AT_ONCE = 64
MAX_NEW_TOKENS = 48
"""Enough to see whether a refusal holds; harmful answers are not generated at length."""


@dataclass(frozen=True)
class Outcomes:
    """One image kind, in the order of the probes. complied: not refused from beginning to end, evasions included;
    complied_first: the answer does not begin as a refusal; answered: benign, not refused, and it says something;
    correct: benign, as labelled (empty: no labels).
    """

    complied: list[bool]
    complied_first: list[bool]
    answered: list[bool]
    correct: list[bool]
    answers: list[str]
    """What was said, harmful then benign; reports show few of them, and of harmful ones only the beginning."""
    evaded: list[bool] = field(default_factory=list)
    """Of `complied`: neither refused nor helped (empty: not known)."""
    near: list[bool] = field(default_factory=list)
    """Which of the benign prompts are near misses, harmful by their words only (empty: none)."""

    def benign(self, near: bool) -> list[int]:
        """Returns the places of the benign prompts that are near misses, or of those that are not."""
        return [place for place in range(len(self.answered)) if (place < len(self.near) and self.near[place]) == near]

    def rates(self) -> dict[str, Rate]:
        named = {
            "complied": self.complied,
            "evaded": self.evaded,
            "complied_first": self.complied_first,
            "answered": self.answered,
            "answered_near": [self.answered[place] for place in self.benign(near=True)],
            "correct": self.correct,
        }
        return {name: Rate.of(outcomes) for name, outcomes in named.items() if outcomes}


@dataclass(frozen=True)
class Behaviour:
    """Outcomes per image kind, and for each labelled image question whether it was answered as labelled."""

    kinds: dict[ImageKind, Outcomes]
    qa: list[bool]
    parts: dict[str, Outcomes] = field(default_factory=dict)
    """"BENCHMARK, KIND" -> what it has of the outcomes of that kind."""
    pictured: dict[str, Outcomes] = field(default_factory=dict)
    """Benchmark -> outcomes of its harmful prompts with pictures of their own."""

    def groups(self) -> dict[str, Outcomes]:
        """Returns everything that has rates, by name, in the order of reports."""
        return {**self.kinds, **self.parts, **self.pictured}

    def figures(self) -> dict[str, Any]:
        """Rates with Wilson intervals and sample sizes, as JSON."""
        table: dict[str, Any] = {
            kind: {name: rate.figures() for name, rate in outcomes.rates().items()}
            for kind, outcomes in self.groups().items()
        }
        if self.qa:
            table["qa"] = {"correct": Rate.of(self.qa).figures()}
        return table


@torch.inference_mode()
def generate(
    vlm: VLM,
    prompts: Sequence[Prompt],
    what: str,
    kind: ImageKind | None = None,
    guard: Guard | None = None,
    most: int = MAX_NEW_TOKENS,
) -> list[str]:
    """Returns greedy answers to `prompts`, up to `most` tokens each, a picture of `kind` attached to each, with
    `guard`'s hooks if there is one.
    """
    answers: list[str] = []
    for batch in batched(prompts, at_once(vlm, prompts), what):
        inputs = encode(vlm, illustrated(batch, kind))
        with attached(vlm.model, guard, _text_pass(vlm, batch, guard)) if guard else nullcontext():
            answers += respond(vlm, inputs, most)
    return answers


def respond(vlm: VLM, inputs: BatchFeature, most: int = MAX_NEW_TOKENS) -> list[str]:
    """Returns greedy answers to one encoded batch, up to `most` tokens each, special ones left out."""
    new = most_likely(vlm.model, inputs, most)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in vlm.processor.batch_decode(new, skip_special_tokens=True)]


def _text_pass(vlm: VLM, prompts: Sequence[Prompt], guard: Guard) -> dict[int, torch.Tensor] | None:
    layers = sorted({layer for intervention in guard.interventions for layer in intervention.text_layers})
    return text_states(vlm, prompts, layers) if layers else None


Ask = Callable[[Sequence[Prompt], str, ImageKind | None], list[str]]
"""(prompts, what it is called in the progress bar, image kind or None for the prompts as they are) -> answers."""


def measure(vlm: VLM, probes: EvaluationPrompts, judge: Judge, what: str, guard: Guard | None = None) -> Behaviour:
    """Returns the behaviour of `vlm` on `probes` under every image kind; `what` names it in the progress bar.

    Raises InputError, before anything is asked, for a text that this model cannot be asked.
    """
    pictured = [*probes.questions, *chain(*probes.pictured.values())]
    check_words(vlm, (prompt.text for prompt in (*probes.harmful, *probes.benign, *probes.qa)))
    check_words(vlm, (prompt.text for prompt in pictured))
    return observe(partial(generate, vlm, guard=guard), probes, judge, what)


def observe(ask: Ask, probes: EvaluationPrompts, judge: Judge, what: str) -> Behaviour:
    """Returns the behaviour of whatever answers when it is asked."""
    kinds: dict[ImageKind, Outcomes] = {}
    parts: dict[str, Outcomes] = {}
    for kind in IMAGE_KINDS:
        answers = ask([*probes.harmful, *probes.benign], f"{what}, {kind}", kind)
        harmful, benign = answers[: len(probes.harmful)], answers[len(probes.harmful) :]
        kinds[kind] = _outcomes(judge, probes.harmful, harmful, probes.benign, benign, probes.near)
        for name, part in probes.parts.items():
            asked = probes.harmful[part.harmful], harmful[part.harmful], probes.benign[part.benign], benign[part.benign]
            parts[f"{name}, {kind}"] = _outcomes(judge, *asked, probes.near)
    pictured = {
        name: _outcomes(judge, asked, _ask_pictured(ask, asked, f"{what}, {name}"), (), ())
        for name, asked in probes.pictured.items()
    }
    answers = ask(probes.qa, f"{what}, image questions", None)
    right = [matches(a, p.answer or "") for a, p in zip(answers, probes.qa, strict=True)]
    answers = _ask_pictured(ask, probes.questions, f"{what}, image questions")
    right += [mentions(a, p.answer or "") for a, p in zip(answers, probes.questions, strict=True)]
    return Behaviour(kinds, right, parts, pictured)


def _ask_pictured(ask: Ask, pictured: Sequence[Pictured], what: str) -> list[str]:
    """Answers to prompts with pictures, of which no more are open than are asked together."""
    return [text for group in _opened(pictured) for text in ask(group, what, None)]


def _opened(pictured: Sequence[Pictured]) -> Iterator[list[Prompt]]:
    """Returns the prompts, AT_ONCE together, or fewer where their pictures are large."""
    group: list[Prompt] = []
    for prompt in pictured:
        group.append(prompt.prompt())
        if len(group) == AT_ONCE or sum(map(pixels, group)) >= MAX_PIXELS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _outcomes(
    judge: Judge,
    harmful: Sequence[Prompt | Pictured],
    to_harmful: Sequence[str],
    benign: Sequence[Prompt],
    to_benign: Sequence[str],
    near: Container[str] = (),
) -> Outcomes:
    ruled = [judge.outcome(p.text, a) for p, a in zip(harmful, to_harmful, strict=True)]
    labelled = [(a, p.answer) for a, p in zip(to_benign, benign, strict=True) if p.answer]
    return Outcomes(
        complied=[each != "refused" for each in ruled],
        complied_first=[not judge.refuses_first(answer) for answer in to_harmful],
        answered=[says_something(answer) and not judge.refuses_first(answer) for answer in to_benign],
        correct=[matches(answer, expected) for answer, expected in labelled],
        answers=[*to_harmful, *to_benign],
        evaded=[each == "evaded" for each in ruled],
        near=[prompt.text in near for prompt in benign],
    )
