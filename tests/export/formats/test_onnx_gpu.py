"""The graphs on a CUDA card: what torch says there, nothing of a decoder layer left on the CPU. Skipped without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import random_basis

from guardfold.export.formats import Formats
from guardfold.export.formats.onnx.layout import PRECISIONS
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.model.vlm import load
from guardfold.pipeline import GuardOptions, export_guarded
from guardfold.validators.evidence.runtime import comparison, observe_in_torch
from guardfold.validators.runtimes.onnx import Runner, onnxruntime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime().get_available_providers(),
        reason="needs a CUDA GPU, torch with CUDA and onnxruntime-gpu",
    ),
]
FP16 = PRECISIONS["fp16"]
SHAPES_ONLY = {
    "Shape",
    "Gather",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Slice",
    "Cast",
    "Range",
    "Add",
    "Sub",
    "Mul",
    "Div",
}
"""What onnxruntime keeps on the CPU by choice where it works out sizes: small integers, never a layer's numbers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a random guard, its float16 graphs compared with torch on the card; read only."""
    place = tmp_path_factory.mktemp("gpu")
    Guard((SublayerProjection({3: random_basis(1, 128)}, 0.5),)).save(place / "guard.safetensors")
    options = GuardOptions(guard=str(place / "guard.safetensors"))
    formats = Formats("safetensors,onnx", "fp16,bf16-native", provider="cuda")
    return export_guarded("demo", place / "out", options, formats, skip_behaviour=True).folder


@torch.inference_mode()
def test_float16_graphs_say_what_torch_says_in_float16_on_the_card(folder: Path) -> None:
    runner = Runner(folder, FP16, "cuda")
    whole = load(folder, "cpu", torch.float32)
    exact = observe_in_torch(whole.model, comparison(whole.model, folder))
    model: Any = load(folder, "cuda", torch.float16).model
    for name, batch in comparison(runner.model, folder).items():
        logits, _ = runner.prefill(batch)
        real = batch["attention_mask"].bool()
        scale = exact[name].logits.abs().max()
        moved = batch.to("cuda", dtype=torch.float16)
        assert (logits[real] - exact[name].logits).abs().max() <= 2e-2 * scale
        theirs = model(**moved).logits.float().cpu()
        assert (logits[real] - theirs[real]).abs().max() <= 2e-2 * scale
        count = {"min_new_tokens": 32, "max_new_tokens": 32, "do_sample": False}
        tokens = model.generate(**moved, **count)[:, batch["input_ids"].shape[1] :].cpu()
        ours = torch.stack(list(runner.tokens(batch.to("cpu"), 32, exact[name].ends)), dim=1)
        assert torch.equal(ours, tokens)


def test_no_node_of_a_decoder_layer_runs_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    runner = Runner(folder, FP16, "cuda", profile=tmp_path / "profile")
    batch = comparison(runner.model, folder)["image"]
    list(runner.tokens(batch, 4))
    ran = [event["args"] for event in json.loads(runner.end_profile().read_text()) if event.get("cat") == "Node"]
    on_cpu = {(each["op_name"], each["provider"]) for each in ran if each.get("provider") == "CPUExecutionProvider"}
    assert {name for name, _ in on_cpu} <= SHAPES_ONLY
    heavy = [each for each in ran if re.search("MatMul|Gemm|Softmax|Attention|LayerNorm", each.get("op_name", ""))]
    assert heavy and {each["provider"] for each in heavy} == {"CUDAExecutionProvider"}


def test_the_cache_never_leaves_the_card(folder: Path) -> None:
    runner = Runner(folder, FP16, "cuda")
    _, state = runner.prefill(comparison(runner.model, folder)["text"])
    assert {value.device_name() for value in state.cache.values()} == {"cuda"}
