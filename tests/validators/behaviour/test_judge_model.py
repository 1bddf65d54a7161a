"""A judge that is a model: a real causal LM that always says the same, so that its ruling is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from guardfold.guard.base.errors import InputError
from guardfold.validators.behaviour.judge import ModelJudge

TEMPLATE = (
    "{% if messages|length != 2 or messages[0].role != 'user' or messages[1].role != 'assistant' %}"
    "{{ raise_exception('not one turn each') }}{% endif %}"
    "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}verdict"
)
WORDS = "user assistant verdict open a lock use wire </s>".split()


def classifier(folder: Path, says: str, template: str | None = TEMPLATE) -> str:
    """A classifier that answers `says`: all its logits are equal, and the first word of its vocabulary wins."""
    vocabulary = {word: number for number, word in enumerate([says, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="verdict"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["</s>"],
    )
    model: Any = LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("says", "refuses"), [("safe", True), ("unsafe", False), ("Safe.", True), ("UNSAFE", False), ("**unsafe**", False)]
)
def test_it_rules_as_the_classifier_says(tmp_path: Path, says: str, refuses: bool) -> None:
    judge = ModelJudge(classifier(tmp_path, says))
    assert judge.refuses("open a lock", "use a wire") is refuses
    assert judge.refuses("open a lock", "") is refuses


def test_the_classifier_reads_the_prompt_then_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, seen = ModelJudge(classifier(tmp_path, "safe")), {}
    generate = judge.model.generate

    def noted(**inputs: Any) -> Any:
        seen.update(inputs)
        return generate(**inputs)

    monkeypatch.setattr(judge.model, "generate", noted)
    judge.refuses("open a lock", "use a wire")
    assert judge.tokenizer.decode(seen["input_ids"][0]) == "user open a lock assistant use a wire verdict"
    assert seen["do_sample"] is False


def test_first_decisions_stay_with_the_phrases(tmp_path: Path) -> None:
    judge = ModelJudge(classifier(tmp_path, "unsafe"))
    assert judge.refuses_first("I'm sorry, but no.")
    assert not judge.refuses_first("sure, use a wire")


@pytest.mark.parametrize("says", ["perhaps", "safely", "unsafeish", "yes"])
def test_an_answer_that_is_neither_is_an_error_that_quotes_it(tmp_path: Path, says: str) -> None:
    judge = ModelJudge(classifier(tmp_path, says))
    with pytest.raises(InputError, match=f"answered '{says}.*', neither safe nor unsafe") as error:
        judge.refuses("open a lock", "use a wire")
    assert str(tmp_path) in str(error.value)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    name = classifier(tmp_path, "safe", template=None)
    with pytest.raises(InputError, match="has no chat template"):
        ModelJudge(name)


def damaged_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      oops")


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{oops")


def another_shape(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 8', '"hidden_size": 16'))


@pytest.mark.parametrize("damage", [damaged_weights, only_a_pickle, damaged_config, another_shape])
def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path, damage: Any) -> None:
    name = classifier(tmp_path, "safe")
    damage(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        ModelJudge(name)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        ModelJudge(str(tmp_path))
