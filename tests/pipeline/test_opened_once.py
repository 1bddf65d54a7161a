"""A model is opened once a run: its class is built once for each folder, and nobody changes what is passed down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from traces import traced_once
from transformers import PreTrainedModel
from zoo import Tiny, random_basis

from guardfold.export.checkpoint import headers
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats import Formats
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.pipeline import GuardOptions, export_guarded
from guardfold.validators.runtimes import onnx as runner


@pytest.fixture(scope="module", autouse=True)
def _traces() -> Iterator[None]:
    with traced_once():
        yield


@pytest.mark.parametrize("names", ["safetensors", "lora", "onnx", "safetensors,onnx"])
def test_a_models_class_is_built_once_for_each_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """The model's, and that of its weights once they are guarded."""
    folder = Tiny(layers=2, dtype=torch.float16).save(tmp_path / "model")
    Guard((SublayerProjection({1: random_basis(1, 32)}),)).save(tmp_path / "guard.safetensors")
    built: Counter[tuple[str, Path]] = Counter()

    def noted(where: str) -> None:
        real = (headers if where == "headers" else runner).meta_model

        def build(folder: Path, *dtype: torch.dtype) -> PreTrainedModel:
            built[where, folder] += 1
            return real(folder, *dtype)

        monkeypatch.setattr(headers if where == "headers" else runner, "meta_model", build)

    for where in ("headers", "graphs"):
        noted(where)
    options = GuardOptions(str(tmp_path / "guard.safetensors"))
    export_guarded(str(folder), tmp_path / "out", options, Formats(names, skip_runtime=True), skip_behaviour=True)
    assert set(built.values()) == {1} and len(built) == (1 if names == "lora" else 2)


def test_a_copy_is_changed_and_the_model_is_not(tiny_folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny_folder)
    before = {name: (tensor.shape, tensor.device.type) for name, tensor in checkpoint.model.state_dict().items()}
    own = checkpoint.own_model()
    assert own is not checkpoint.model and own.config is not checkpoint.model.config
    assert {name: (tensor.shape, tensor.device.type) for name, tensor in own.state_dict().items()} == before
    own.set_attn_implementation("eager")
    own.get_input_embeddings().forward = lambda *_: pytest.fail("shared")
    own.get_input_embeddings().weight = torch.nn.Parameter(torch.zeros(1))
    assert {
        name: (tensor.shape, tensor.device.type) for name, tensor in checkpoint.model.state_dict().items()
    } == before
    assert "forward" not in vars(checkpoint.model.get_input_embeddings())
    assert checkpoint.own_model().config._attn_implementation == checkpoint.model.config._attn_implementation
    assert checkpoint.own_model(torch.float64).dtype == torch.float64


def test_a_copy_keeps_what_is_tied(tmp_path: Path) -> None:
    own = Checkpoint.open(Tiny(tied=True).save(tmp_path / "model")).own_model()
    assert own.lm_head.weight is own.get_input_embeddings().weight
