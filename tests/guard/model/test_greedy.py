"""The most likely words, whatever a generation config asks for; and what it asks for, said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from zoo import change_json

from guardfold.guard.base.errors import InputError
from guardfold.guard.model.generation import asks_for
from guardfold.guard.model.greedy import most_likely
from guardfold.guard.model.vlm import VLM
from guardfold.guard.prompts.prompts import Prompt, encode

ASKED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 3.0,
    "top_k": 2,
    "num_beams": 3,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[7], [8]],
    "suppress_tokens": [9, 10],
    "begin_suppress_tokens": [11],
    "min_length": 200,
    "guidance_scale": 2.0,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 1.5),
    "sequence_bias": [[[12], 9.0]],
}
TOKENS = 6


@pytest.fixture
def plain(tiny: VLM) -> Iterator[VLM]:
    """The tiny model, its generation config kept from change."""
    model: Any = tiny.model
    before = model.generation_config
    yield tiny
    model.generation_config = before


@torch.inference_mode()
def step_by_step(vlm: VLM, prompt: str) -> list[int]:
    """The most likely word, TOKENS times, each from a pass over everything before it; no end of text."""
    batch = encode(vlm, [Prompt(prompt)])
    ids, model = batch["input_ids"], vlm.model
    for _ in range(TOKENS):
        logits = model(input_ids=ids).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", ASKED)
def test_the_most_likely_words_are_said_whatever_is_asked_for(plain: VLM, name: str) -> None:
    model: Any = plain.model
    ends = {"eos_token_id": None, "pad_token_id": 0}
    model.generation_config = asking = GenerationConfig(**ends, **{name: ASKED[name]})
    inputs = encode(plain, [Prompt("how to paint a wall ?")])
    made = most_likely(model, inputs, TOKENS)
    assert made[:, inputs["input_ids"].shape[1] :].tolist() == [step_by_step(plain, "how to paint a wall ?")]
    assert model.generation_config is asking


def test_ends_of_text_are_kept(plain: VLM) -> None:
    first = step_by_step(plain, "how to walk ?")[0]
    model: Any = plain.model
    model.generation_config = GenerationConfig(eos_token_id=[1, first], pad_token_id=0)
    inputs = encode(plain, [Prompt("how to walk ?")])
    assert most_likely(model, inputs, TOKENS)[0, inputs["input_ids"].shape[1] :].tolist() == [first]


def test_the_config_comes_back_after_an_error(plain: VLM) -> None:
    model: Any = plain.model
    model.generation_config = asking = GenerationConfig(num_beams=3)
    with pytest.raises(InputError, match="cannot run it"):
        most_likely(model, encode(plain, [Prompt("how to walk ?")]), TOKENS, logits_processor=[None])
    assert model.generation_config is asking


def test_what_a_config_asks_for_is_told(model: Path) -> None:
    asked = {**ASKED, "num_return_sequences": 2}
    change_json(model / "generation_config.json", **asked)
    assert asks_for(model) == json.loads(json.dumps(asked))


def test_what_asks_for_nothing_is_not_told(model: Path) -> None:
    nothing = {"do_sample": False, "temperature": 0.7, "num_beams": 1, "repetition_penalty": 1.0, "bad_words_ids": None}
    change_json(model / "generation_config.json", **nothing)
    assert asks_for(model) == {}
    (model / "generation_config.json").unlink()
    assert asks_for(model) == {}


def test_a_config_that_is_no_json_is_bad_input(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config.json: not sound JSON"):
        asks_for(model)
