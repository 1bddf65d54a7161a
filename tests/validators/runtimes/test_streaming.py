"""A model computed straight from its files equals the one that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from transformers import AutoModelForImageTextToText
from zoo import STYLES, Tiny, change_tensors, corners, name_of, variations

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.guard.base.errors import InputError
from guardfold.validators.runtimes.streamed import streamed


def same_logits(folder: Path, shape: Tiny) -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with streamed(Checkpoint.open(folder)) as model:
        for batch in reference.batches(shape.processor()).values():
            assert reference.distance(reference.logits(model, batch), reference.logits(loaded, batch)) <= 1e-5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [*variations()[::2], *corners()], ids=name_of)
def test_streamed_logits_are_those_of_the_loaded_model(tmp_path: Path, shape: Tiny, style: str) -> None:
    same_logits(shape.save(tmp_path / "model", processor=False, **STYLES[style]), shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_computed_with_in_float32(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    shape = Tiny("llava_next", tied=tied, dtype=dtype)
    folder = shape.save(tmp_path / "model", processor=False)
    same_logits(folder, shape)
    with streamed(Checkpoint.open(folder)) as model:
        assert reference.logits(model, reference.batches(shape.processor())["text"]).dtype == torch.float32


def test_streamed_generation_is_that_of_the_loaded_model(tiny_folder: Path) -> None:
    shape = Tiny()
    batch = reference.batches(shape.processor())["image"]
    options: dict[str, Any] = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tiny_folder, dtype=torch.float32)
    with streamed(Checkpoint.open(tiny_folder)) as model:
        tokens = model.generate(**batch, **options)  # type: ignore[operator]
    assert torch.equal(tokens, loaded.generate(**batch, **options))


@pytest.mark.parametrize(
    "name", ["language_model.model.layers.1.mlp.down_proj.weight", "vision_tower.encoder.layers.0.layer_norm1.bias"]
)
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = Tiny().save(tmp_path / "model", processor=False)
    change_tensors(folder, lambda held: held.pop(name))
    missing = name[name.index("layers") :]
    with pytest.raises(InputError, match=f"no tensor for .*{missing}"), streamed(Checkpoint.open(folder)):
        pytest.fail("streamed")


def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    folder = Tiny().save(tmp_path / "model", processor=False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"has shape .*, config\.json says"), streamed(Checkpoint.open(folder)):
        pytest.fail("streamed")
