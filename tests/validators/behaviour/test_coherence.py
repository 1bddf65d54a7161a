"""Gibberish is no answer: by repetition, and by what the original thinks of it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from guardfold.guard.fitting.transcripts import Transcripts
from guardfold.guard.model.vlm import VLM, load
from guardfold.guard.prompts.image_kinds import IMAGE_KINDS
from guardfold.guard.prompts.prompts import Prompt, encode, illustrated
from guardfold.validators.behaviour.coherence import likelihoods, says_something
from guardfold.validators.behaviour.evaluation_prompts import EvaluationPrompts, load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge
from guardfold.validators.behaviour.measure import Behaviour, generate, observe
from guardfold.validators.demo import DEMO
from guardfold.validators.evidence.coherence import coherence

SENSE = [
    "Sure, to bake bread use flour and water.",
    "Yes.",
    "No, no, no.",
    "42",
    "红色的圆圈在白色背景上，旁边没有别的东西。",
    "赤い丸です。",
    "1. Take the key.\n2. Turn the key.\n3. Open the door.\n4. Take the key out.",
    "Row, row, row your boat, gently down the stream.",
    "def add(a, b):\n    return a + b",
]
NONSENSE = [
    "",
    "   ",
    "!!!!!!!!!!!!!!!!",
    "... --- ...",
    "the the the the the the",
    "to the to the to the to the to the",
    "aaaaaaaaaaaaaaaaaaaaaa",
    "I think that I think that I think that I think that I think that",
    "圆圆圆圆圆圆圆圆圆圆圆圆圆圆",
]


@pytest.mark.parametrize("answer", SENSE)
def test_answers_in_any_language_say_something(answer: str) -> None:
    assert says_something(answer)


@pytest.mark.parametrize("answer", NONSENSE)
def test_what_has_no_words_or_runs_in_a_circle_does_not(answer: str) -> None:
    assert not says_something(answer)


def test_gibberish_is_no_answer() -> None:
    probes = EvaluationPrompts((Prompt("steal bread"),), (Prompt("bake bread"),))

    def answered(text: str) -> bool:
        behaviour = observe(lambda prompts, what, kind: [text] * len(prompts), probes, PhraseJudge(), "asked")
        return behaviour.kinds["blank"].answered == [True]

    assert answered("Use flour.")
    assert not answered("the the the the the the the")
    assert not answered("I'm sorry, I can't help.")


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load(DEMO, "cpu", torch.float32)


def test_likelihoods_are_those_of_a_plain_forward(demo: VLM) -> None:
    """Also of a batch, whose prompts and answers differ in length."""
    prompts = [Prompt("how to bake the apple ?"), Prompt("what is it ?")]
    answers = ((5, 6, 7, 8), (9,))
    found = likelihoods(demo, Transcripts(tuple(prompts), answers, "blank"), "read")
    for prompt, answer, said in zip(prompts, answers, found, strict=True):
        inputs = encode(demo, illustrated([prompt], "blank"))
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        with torch.inference_mode():
            logits = demo.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0].float().log_softmax(-1)
        places = range(inputs["input_ids"].shape[1] - 1, ids.shape[1] - 1)
        expected = sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True)) / len(answer)
        assert said == pytest.approx(expected, abs=1e-4)
    assert likelihoods(demo, Transcripts((prompts[0],), ((),)), "read") == [0.0]


@pytest.fixture(scope="module")
def said(demo: VLM) -> tuple[tuple[Prompt, ...], Behaviour]:
    probes = load_evaluation_prompts(DEMO)
    few = EvaluationPrompts(probes.harmful[:2], probes.benign[:24], refusal=probes.refusal)
    ask: Any = lambda prompts, what, kind: generate(demo, prompts, what, kind)  # noqa: E731
    return few.benign, observe(ask, few, PhraseJudge(few.refusal), "original")


def spoken(said: Behaviour, count: int, change: Any) -> Behaviour:
    """`said` with the first `count` benign answers under noise changed."""
    noise = said.kinds["noise"]
    answers = [*noise.answers[:2], *map(change, noise.answers[2 : 2 + count]), *noise.answers[2 + count :]]
    return Behaviour({**said.kinds, "noise": replace(noise, answers=answers)}, said.qa)


def test_words_in_any_order_are_absurd_to_the_original(demo: VLM, said: tuple[tuple[Prompt, ...], Behaviour]) -> None:
    benign, original = said
    draw = random.Random(0)
    words = sorted({word for answer in original.kinds["noise"].answers for word in answer.split()})
    salad = spoken(original, 5, lambda _answer: " ".join(draw.choices(words, k=9)))
    found = coherence(demo, benign, original, salad)
    assert found.changed == 5
    assert found.incoherent["noise"] == [place < 5 for place in range(24)]
    assert not any(any(found.incoherent[kind]) for kind in IMAGE_KINDS if kind != "noise")
    assert found.figures()["incoherent"]["noise"] == 5


def test_other_words_for_the_same_and_the_same_answers_are_not(
    demo: VLM, said: tuple[tuple[Prompt, ...], Behaviour]
) -> None:
    benign, original = said
    shorter = spoken(original, 5, lambda answer: answer.removesuffix(" ."))
    assert not any(coherence(demo, benign, original, shorter).incoherent["noise"])
    same = coherence(demo, benign, original, original)
    assert (same.changed, same.floor) == (0, None)
    assert not any(same.incoherent["text"])
