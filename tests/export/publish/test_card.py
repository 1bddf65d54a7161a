"""The model card: what the hub takes and a reviewer looks for, whatever the base's own card says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_client import use_hub
from hub_server import HubServer
from huggingface_hub import ModelCard
from zoo import random_basis

from guardfold.export.publish.card import write_card
from guardfold.export.source import Source
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.pipeline import GuardOptions
from guardfold.pipeline.describing import _command

GUARD = Guard((SublayerProjection({1: random_basis(1, 32)}),))
SECTIONS = (
    "What this is",
    "Intended use",
    "Load it",
    "Measured",
    "Limits",
    "Reproduce and verify",
    "Licence and attribution",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(server, tmp_path / "home", monkeypatch)
        yield server


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A model as huggingface_hub keeps it, named after its commit."""
    folder = tmp_path / "snapshots" / ("a1" * 20)
    folder.mkdir(parents=True)
    return Source("owner/base", folder)


def card(source: Source, folder: Path, verified: bool = True, **more: Any) -> ModelCard:
    folder.mkdir(exist_ok=True)
    write_card(folder, source, GUARD, "safer" if verified else "undecided", verified, "| a | b |", **more)
    return ModelCard.load(folder / "README.md")


def test_the_hub_takes_it_and_it_has_what_a_reviewer_looks_for(hub: HubServer, source: Source, tmp_path: Path) -> None:
    (source.folder / "README.md").write_text("---\nlicense: llama2\n---\n")
    made = card(source, tmp_path / "out", pictures={"guardfold/a.png": "bars"}, command="guardfold export --again")
    made.validate()
    assert made.data.to_dict() == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "llama2",
        "pipeline_tag": "image-text-to-text",
        "tags": ["guardfold", "vlm-guard"],
    }
    assert [line[3:] for line in made.text.splitlines() if line.startswith("## ")] == list(SECTIONS)
    for said in (
        *("https://huggingface.co/owner/base", "a1" * 20, "llama2", "![bars](guardfold/a.png)", "| a | b |"),
        *("AutoModelForImageTextToText.from_pretrained", "vllm serve", "onnxruntime.InferenceSession"),
        *("@huggingface/transformers", "guardfold export --again", "guardfold verify", "sublayer-projection"),
    ):
        assert said in made.text
    assert "NOT VERIFIED" not in made.text


def test_what_was_not_shown_to_be_safer_says_so_first(source: Source, tmp_path: Path) -> None:
    lines = [line for line in card(source, tmp_path / "out", verified=False).text.splitlines() if line]
    assert lines[1].startswith("**NOT VERIFIED.** Verdict: undecided")


def test_a_local_model_names_no_base_on_the_hub(hub: HubServer, source: Source, tmp_path: Path) -> None:
    made = card(Source("model", source.folder), tmp_path / "out")
    made.validate()
    assert not {"base_model", "base_model_relation"} & made.data.to_dict().keys()


def test_an_adapter_is_one(hub: HubServer, source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    made = card(source, tmp_path / "out")
    made.validate()
    assert (made.data.to_dict()["base_model_relation"], made.data.to_dict()["library_name"]) == ("adapter", "peft")
    assert 'PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained("owner/base")' in made.text


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: other\nlicense_name: own\nlicense_link: LICENSE", {"license", "license_name", "license_link"}),
        ("license: [mit, apache-2.0]", set()),
        ("license: 'two words'", set()),
        ("license: 'mit\n\n  tags: [a]'", set()),
        ("license: mit\nlicense_name: [1]", {"license"}),
        ("- a", set()),
        ("a: [", set()),
    ],
)
def test_of_a_strange_base_card_the_hub_still_takes_ours(
    hub: HubServer, source: Source, tmp_path: Path, front: str, kept: set[str]
) -> None:
    (source.folder / "README.md").write_text(f"---\n{front}\n---\n")
    made = card(source, tmp_path / "out")
    made.validate()
    assert {name for name in made.data.to_dict() if name.startswith("license")} == kept


def test_the_command_that_makes_it_again_names_the_commit_and_no_place(source: Source, tmp_path: Path) -> None:
    options = GuardOptions("gate", strength=0.5, placement="widen", anchors=tmp_path / "anchors.csv")
    said = _command(source, options)
    assert said == (
        f"guardfold export --model owner/base@{'a1' * 20} --guard gate --strength 0.5 --placement widen "
        "--anchors anchors.csv"
    )
    assert _command(Source("demo", tmp_path), GuardOptions()) == "guardfold export --model demo"
    strange = GuardOptions(anchors=tmp_path / os.fsdecode(b"a\n\xff.csv"))
    assert _command(source, strange).endswith(r"--anchors a\n\udcff.csv")
    given = _command(source, GuardOptions(str(tmp_path / "mine.safetensors")))
    assert given.endswith("--guard guardfold/guard.safetensors")
