"""The graphs of every family that has some say in onnxruntime what the model says in torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from specimens import Knobs, build
from specimens.known import KNOWN
from transformers import BatchFeature
from zoo import Tiny, change_tensors, random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats.onnx import weights
from guardfold.export.formats.onnx.graphs import Plan, Traced, write_graphs
from guardfold.export.formats.onnx.layout import DECODER, EMBED, GRAPHS, PRECISIONS, VISION, graph_file, precisions
from guardfold.export.formats.onnx.paths import PATHS, path_of
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import ResidualProjection
from guardfold.guard.model.vlm import VLM, load
from guardfold.validators.evidence.runtime import Agreement, agreement, as_prompts, comparison, observe_in_torch
from guardfold.validators.runtimes.onnx import Runner

FP32 = PRECISIONS["fp32"]
FAMILIES = {
    specimen.config(Knobs()).model_type: specimen
    for specimen in reversed(KNOWN)
    if specimen.config(Knobs()).model_type in PATHS
}


def test_every_family_with_a_path_has_a_specimen() -> None:
    assert FAMILIES.keys() == PATHS.keys()


EVERY_TIME = ("qwen2_5_vl",)
"""The path with most to work out in its graph; the others are for continuous integration."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name in EVERY_TIME else pytest.mark.families) for name in sorted(FAMILIES)],
)
def test_graphs_say_what_torch_says(family: str, tmp_path: Path) -> None:
    """Logits within 1e-4 and the same 32 tokens: text, one picture, several of different sizes, rows padded left.

    PaliGemma's logits are larger and torch's own float32 ones up to 1e-4 from its float64 ones.
    """
    specimen, tied = FAMILIES[family], sorted(FAMILIES).index(family) % 2 == 0
    model = build(specimen, Knobs(layers=2, tied=tied), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    model.generation_config.eos_token_id = 2
    inputs = specimen.inputs(model.config)
    batches = {
        kind: as_prompts(model, BatchFeature({name: _single(value) for name, value in inputs[kind].items()}))
        for kind in ("text", "image", "images")
    }
    write_graphs(Checkpoint.open(tmp_path), tmp_path, Plan((FP32,)))
    runner = Runner(tmp_path, FP32, "cpu")
    found = agreement(runner, batches, observe_in_torch(model, batches))
    assert not found.failures
    assert max(found.prefill, found.decode) * found.scale <= (1e-4 if found.scale <= 10 else 3e-5 * found.scale)
    assert (found.greedy, found.greedy_tokens) == (1, 32 * 5)
    blind = BatchFeature(
        {name: -value if value.is_floating_point() else value for name, value in batches["image"].items()}
    )
    moved = runner.prefill(blind)[0] - runner.prefill(batches["image"])[0]
    assert moved.abs().max() > 1e-2 * found.scale


def _single(value: Any) -> Any:
    return value.float() if value.is_floating_point() else value


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose tower has a layer above the one that is read; read only."""
    folder = Tiny(layers=2, tied=True, dtype=torch.bfloat16).save(tmp_path_factory.mktemp("onnx") / "tiny")
    return folder


@pytest.fixture(scope="module")
def traced(source: Path) -> Traced:
    return Traced.of(Checkpoint.open(source), torch.float32, None)


@pytest.fixture(scope="module")
def tiny_model(source: Path) -> VLM:
    return load(source, "cpu", torch.float32)


def prepared(source: Path, place: Path) -> Path:
    """A folder with everything but weights."""
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors"))
    return place


def compared(folder: Path, vlm: VLM, name: str = "fp32") -> Agreement:
    runner = Runner(folder, PRECISIONS[name], "cpu")
    return agreement(
        runner, comparison(runner.model, folder), observe_in_torch(vlm.model, comparison(vlm.model, vlm.folder))
    )


def test_names_and_dims_are_those_that_transformers_js_resolves(traced: Traced, tmp_path: Path) -> None:
    traced.write(FP32, tmp_path, "copy")
    ports = {}
    for graph in GRAPHS:
        model = onnx.load(tmp_path / graph_file(graph, FP32))
        onnx.checker.check_model(model, full_check=True)
        for which in ("input", "output"):
            values = getattr(model.graph, which)
            ports[graph, which] = {
                v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
            }
    cache = ["batch_size", 2, "past_sequence_length", 8]
    assert ports[VISION, "input"] == {"pixel_values": ["batch_size", 3, 24, 24]}
    assert ports[VISION, "output"] == {"image_features": ["batch_size", 9, 32]}
    assert ports[EMBED, "input"] == {"input_ids": ["batch_size", "sequence_length"]}
    assert ports[EMBED, "output"] == {"inputs_embeds": ["batch_size", "sequence_length", 32]}
    assert ports[DECODER, "input"] == {
        "inputs_embeds": ["batch_size", "sequence_length", 32],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **{f"past_key_values.{layer}.{part}": cache for layer in (0, 1) for part in ("key", "value")},
    }
    present = [f"present.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert list(ports[DECODER, "output"]) == ["logits", *present]


def test_a_graph_tells_nothing_of_where_it_was_made(traced: Traced, tmp_path: Path) -> None:
    traced.write(FP32, tmp_path, "copy")
    for graph in GRAPHS:
        assert b"site-packages" not in (tmp_path / graph_file(graph, FP32)).read_bytes()


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_weights_may_lie_in_files_of_their_own_none_too_long_for_a_browser(
    traced: Traced, source: Path, tiny_model: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, limit = prepared(source, tmp_path / "out"), 20_000
    monkeypatch.setattr(weights, "INLINE_BYTES", 0)
    monkeypatch.setattr(weights, "FILE_BYTES", limit)
    files = traced.write(PRECISIONS[name], folder, "copy")
    decoder = graph_file(DECODER, PRECISIONS[name])
    written = {path.name: path.stat().st_size for path in folder.glob(f"{decoder}_data*")}
    assert len(written) == files[decoder] > 1
    assert written.keys() == {f"{decoder}_data", *(f"{decoder}_data_{i}" for i in range(1, files[decoder]))}
    assert max(written.values()) <= limit
    assert not compared(folder, tiny_model, name).failures


def test_shared_weights_are_those_of_the_safetensors_and_no_byte_is_written_twice(
    traced: Traced, source: Path, tiny_model: VLM, tmp_path: Path
) -> None:
    folder = prepared(source, tmp_path / "out")
    shutil.copy(source / "model.safetensors", folder)
    traced.write(FP32, folder, "shared")
    assert not list(folder.glob("*_data*"))
    assert sum((folder / graph_file(graph, FP32)).stat().st_size for graph in GRAPHS) < 90_000
    assert not compared(folder, tiny_model).failures
    change_tensors(folder, lambda held: held.update({name: torch.zeros_like(each) for name, each in held.items()}))
    runner = Runner(folder, FP32, "cpu")
    assert not runner.prefill(comparison(runner.model, folder)["text"])[0].any()


def test_a_guard_that_weights_cannot_hold_is_traced(source: Path, tiny_model: VLM, tmp_path: Path) -> None:
    folder = prepared(source, tmp_path / "out")
    bases = {0: random_basis(2, 32, 1), 1: random_basis(1, 32, 2)}
    guard = Guard((ResidualProjection(bases, 0.75, alpha=1.5),))
    write_graphs(Checkpoint.open(source), folder, Plan((FP32,), traced=guard))
    runner = Runner(folder, FP32, "cpu")
    batches = comparison(runner.model, folder)
    hooked, bare = observe_in_torch(tiny_model.model, batches, guard), observe_in_torch(tiny_model.model, batches)
    assert not agreement(runner, batches, hooked).failures
    assert agreement(runner, batches, bare).prefill > 1e-2


def test_a_tensor_that_no_graph_reads_is_an_error(source: Path, traced: Traced, tmp_path: Path) -> None:
    """As if the tracing had lost a bias."""
    lossy = traced.graphs[DECODER].clone()
    bias = next(name for name in lossy.graph.initializers if name.endswith("o_proj.bias"))
    value = lossy.graph.initializers[bias]
    (node,) = value.consumers()
    other = next(each for each in node.inputs if each is not value)
    node.outputs[0].replace_all_uses_with(other)  # type: ignore[arg-type]
    lossy.graph.remove(node, safe=True)
    del lossy.graph.initializers[bias]
    with pytest.raises(InputError, match=r"o_proj\.bias' is in none of the graphs"):
        replace(traced, graphs={**traced.graphs, DECODER: lossy}).write(FP32, tmp_path, "copy")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop("language_model.model.norm.weight"), "no tensor for model.language_model.norm.weight"),
        (lambda held: held.update({"language_model.model.norm.weight": torch.ones(31)}), r"norm.weight' is \[31\]"),
        (lambda held: held["language_model.model.norm.weight"].fill_(torch.inf), "norm.weight' has NaN or Inf"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_graphs_is_an_error(
    source: Path, traced: Traced, tmp_path: Path, change: Any, said: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    held = {name: tensor.clone() for name, tensor in load_file(broken / "model.safetensors").items()}
    change(held)
    save_file(held, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=said):
        replace(traced, checkpoint=Checkpoint.open(broken)).write(FP32, tmp_path, "copy")


def test_a_family_without_graphs_is_refused_by_name(tmp_path: Path) -> None:
    folder = Tiny(layers=2).save(tmp_path / "tiny", processor=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "video_llava"}))
    with pytest.raises(InputError, match="family 'video_llava' has no ONNX graphs yet; known: idefics3, internvl"):
        write_graphs(Checkpoint.open(folder), folder, Plan((FP32,)))


def test_a_prefix_decoder_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    (around_gemma2,) = (specimen for specimen in KNOWN if specimen.name == "paligemma+gemma2")
    with pytest.raises(InputError, match="paligemma with sliding windows in its decoder has no ONNX graphs yet"):
        path_of(build(around_gemma2, Knobs()))


@pytest.mark.parametrize(("text", "said"), [("fp31", "'fp31': one of fp32, fp16"), ("q4,q4", "names one twice")])
def test_number_formats_that_there_are_not(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        precisions(text)


def test_quantised_weights_are_never_shared() -> None:
    with pytest.raises(InputError, match="q4 has weights of its own"):
        Plan(precisions("fp32,q4"), "shared")
