"""Residual writers: found on disk for every family and style, refused by name where they cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zoo import STYLES, Tiny, change_tensors, corners, name_of, variations

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import family_of
from guardfold.guard.base.errors import InputError

WRITER = re.compile(
    r"model\.language_model\.(embed_tokens\.weight|layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias))"
    r"|model\.multi_modal_projector\.linear_2\.(weight|bias)|model\.image_newline"
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", variations() + corners(), ids=name_of)
def test_every_writer_is_found_in_every_style(tmp_path: Path, shape: Tiny, style: str) -> None:
    folder = shape.save(tmp_path / "model", processor=False, **STYLES[style])
    checkpoint, state = Checkpoint.open(folder), shape.model().state_dict()
    family = family_of(checkpoint)
    assert (family.model_type, family.text_model_type) == (shape.family, shape.text)
    assert (family.layers, family.width, family.pre_norm, family.tied) == (3, shape.width, True, shape.tied)
    assert {writer.memory for writer in family.writers} == {name for name in state if WRITER.fullmatch(name)}
    for writer in family.writers:
        assert torch.equal(checkpoint.read(writer.disk), state[writer.memory])
        assert checkpoint.info(writer.disk).shape[writer.axis] == shape.width
        assert writer.layer == (int(found[1]) if (found := re.search(r"layers\.(\d+)", writer.memory)) else None)
    assert torch.equal(checkpoint.read(family.embedding), state["model.language_model.embed_tokens.weight"])
    assert (family.head in checkpoint.tensors) != shape.tied
    assert family.untied_head == ("language_model.lm_head.weight" if STYLES[style]["legacy"] else "lm_head.weight")
    assert family.head in (None, family.untied_head)


def test_biases_are_those_of_the_file(tmp_path: Path) -> None:
    counts = {}
    for bias in (True, False):
        for projector in (True, False):
            folder = Tiny(bias=bias, projector_bias=projector).save(tmp_path / f"{bias}{projector}", processor=False)
            family = family_of(Checkpoint.open(folder))
            counts[bias, projector] = sum(writer.memory.endswith(".bias") for writer in family.writers)
    assert counts == {(True, True): 7, (True, False): 6, (False, True): 1, (False, False): 0}


LAYER = "language_model.model.layers.1."
CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a down_proj missing": (lambda held: held.pop(LAYER + "mlp.down_proj.weight"), "layers.1.mlp.down_proj.weight"),
    "an o_proj missing": (lambda held: held.pop(LAYER + "self_attn.o_proj.weight"), "layers.1.self_attn.o_proj.weight"),
    "the projector missing": (
        lambda held: held.pop("multi_modal_projector.linear_2.weight"),
        "model.multi_modal_projector.linear_2.weight",
    ),
    "the embedding missing": (lambda held: held.pop("language_model.model.embed_tokens.weight"), "embed_tokens.weight"),
    "the newline missing": (lambda held: held.pop("image_newline"), "model.image_newline"),
    "another shape": (
        lambda held: held.update({LAYER + "mlp.down_proj.weight": torch.ones(32, 47)}),
        r"layers\.1\.mlp\.down_proj\.weight' has shape \[32, 47\], config\.json says \[32, 48\]",
    ),
    "transposed": (
        lambda held: held.update({LAYER + "mlp.down_proj.weight": torch.ones(48, 32)}),
        r"layers\.1\.mlp\.down_proj\.weight' has shape \[48, 32\]",
    ),
    "quantised": (
        lambda held: held.update({LAYER + "mlp.down_proj.weight": torch.ones(32, 48, dtype=torch.int8)}),
        "is I8; quantised checkpoints are not folded",
    ),
    "eight bits": (
        lambda held: held.update({LAYER + "self_attn.o_proj.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}),
        "is F8_E4M3; quantised checkpoints are not folded",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_writer_that_is_missing_or_strange_is_refused_by_name(tmp_path: Path, change: str) -> None:
    folder = Tiny("llava_next").save(tmp_path / "model", processor=False)
    edit, says = CHANGES[change]
    change_tensors(folder, edit)
    with pytest.raises(InputError, match=says) as error:
        family_of(Checkpoint.open(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": 5},
        {"text_config": {"model_type": ["llama"]}},
        {"text_config": {"model_type": "no-such-model"}},
        {"text_config": {"model_type": "llama", "hidden_size": "wide"}},
        {"text_config": {"model_type": "llama", "hidden_size": -32}},
        {"vision_config": []},
        {"vision_config": {"model_type": "clip_vision_model", "patch_size": 0}},
    ],
    ids=json.dumps,
)
def test_a_config_of_no_model_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = Tiny().save(tmp_path / "model", processor=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError) as error:
        family_of(Checkpoint.open(folder))
    assert str(folder) in str(error.value)


def test_whether_the_head_is_tied_is_for_the_file_to_say(tmp_path: Path) -> None:
    folder = Tiny(tied=False).save(tmp_path / "model", processor=False)
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert family_of(Checkpoint.open(folder)).head == "language_model.lm_head.weight"


def test_no_weights_are_read(tmp_path: Path) -> None:
    folder = Tiny().save(tmp_path / "model", processor=False)
    held = Checkpoint.open(folder)
    shapes = {name: torch.zeros(held.info(name).shape) for name in held.tensors}
    expected = family_of(held)
    save_file(shapes, folder / "model.safetensors")
    with (folder / "model.safetensors").open("r+b") as file:
        opened = Checkpoint.open(folder)
        file.truncate(opened.shards[0].data_start)
        assert family_of(opened) == expected
