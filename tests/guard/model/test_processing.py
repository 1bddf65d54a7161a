"""Processors that others wrote: chat templates that loop, tokenizers that exhaust, pictures that fill the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deadline import within
from zoo import change_json

from guardfold.guard.base.errors import InputError
from guardfold.guard.model import trial
from guardfold.guard.model.vlm import load_processor, meta_model
from guardfold.validators.evidence.batches import comparison_batches

TEMPLATES = {
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
        "takes over 1 seconds",
    ),
    "a large text": ("{{ 'a' * 10 ** 11 }}", "takes over .* MB"),
    "a growing text": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "takes over .* MB",
    ),
    "a long answer": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "makes over .* characters"),
    "not a template": ("{% for %}", "fails .TemplateSyntaxError"),
    "none of the question": ("USER: <image>", "does not take a question in parts"),
    "plain text only": ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not take a question in parts"),
    "no place for a picture": (
        "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
        "has no place for a picture",
    ),
    "a complaint": ("{{ raise_exception('not today\nnor tomorrow') }}", "fails .TemplateError: not today nor tomorrow"),
    "an escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails .SecurityError"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_hostile_chat_template_is_refused_in_time(model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, says = TEMPLATES[kind]
    (model / "chat_template.jinja").write_text(template)
    if kind == "endless":
        monkeypatch.setattr(trial, "SECONDS", 1.0)
    with within(300), pytest.raises(InputError, match=f"its chat template {says}") as error:
        load_processor(model)
    assert "\n" not in str(error.value)


def test_a_sound_chat_template_is_taken(model: Path) -> None:
    """It knows both what is said and where a picture stands."""
    part = "{{ '<image>' if part.type == 'image' else part.text }}"
    loops = "{% for m in messages %}{% for part in m.content %}" + part + "{% endfor %}{% endfor %}"
    (model / "chat_template.jinja").write_text(loops)
    assert load_processor(model).chat_template


PROCESSORS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pictures of gigabytes": ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 40000}}}, ""),
    "millions of words a picture": ("processor_config.json", {"num_additional_image_tokens": 2 * 10**8}, ""),
    "no patches": ("processor_config.json", {"patch_size": 0}, "ZeroDivisionError"),
    "no number": ("processor_config.json", {"image_processor": {"rescale_factor": "x"}}, ""),
    "another word for a picture": ("tokenizer_config.json", {"image_token": "zzz"}, ""),
    "no padding": ("tokenizer_config.json", {"pad_token": None, "eos_token": None, "tokenizer_class": None}, "pad"),
    "nothing that a model takes": ("tokenizer_config.json", {"model_input_names": ["x"]}, "makes no"),
    "padding of gigabytes": (
        "tokenizer.json",
        {
            "padding": {
                **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 2 * 10**8},
                **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
            }
        },
        "SIGABRT",
    ),
    "a rule that backtracks": (
        "tokenizer.json",
        {"normalizer": {"type": "Replace", "pattern": {"Regex": r"(([a-z ?:])+.)+\d"}, "content": "a"}},
        "",
    ),
    "rules that multiply": (
        "tokenizer.json",
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}] * 9,
            }
        },
        "",
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_hostile_processor_is_refused_in_time(
    model: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name, values, says = PROCESSORS[kind]
    change_json(model / name, **values)
    monkeypatch.setattr(trial, "SECONDS", 5.0)
    ends = "(takes? over|cannot take|is ended by|makes no)"
    with within(300), pytest.raises(InputError, match=f"its processor.*{ends}.*{says}") as error:
        load_processor(model)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_an_exhausting_template_is_refused_even_where_no_processor_is_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a processor, two models are compared on words drawn from the config; this is not such a case."""
    (model / "chat_template.jinja").write_text(TEMPLATES["endless"][0])
    monkeypatch.setattr(trial, "SECONDS", 1.0)
    with pytest.raises(InputError, match="takes over 1 seconds"):
        comparison_batches(meta_model(model), model)


def test_a_damaged_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": 7}')
    with pytest.raises(InputError, match="transformers cannot load its processor"):
        load_processor(model)
