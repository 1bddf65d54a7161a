"""`guardfold export --format onnx` and `guardfold chat`: what is published, what is refused, what is said."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from command import Command
from PIL import Image
from traces import traced_once
from transformers import AutoModelForImageTextToText
from zoo import Tiny, change_tensors, random_basis

from guardfold.export.formats import Formats
from guardfold.export.formats.onnx import configs, trace
from guardfold.export.formats.onnx.layout import DECODER, GRAPHS
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import ResidualProjection, SublayerProjection
from guardfold.guard.model.vlm import load
from guardfold.pipeline import Export, GuardOptions, NotSafer, export_guarded
from guardfold.validators.evidence import runtime
from guardfold.validators.runtimes import chat
from guardfold.validators.runtimes import onnx as runner

GUARD = Guard((SublayerProjection({0: random_basis(1, 32)}),))


@pytest.fixture(scope="module", autouse=True)
def _traces() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and guards for it; read only."""
    folder = tmp_path_factory.mktemp("export")
    Tiny(layers=2, dtype=torch.float16).save(folder / "tiny")
    GUARD.save(folder / "guard.safetensors")
    return folder


def options(place: Path) -> GuardOptions:
    return GuardOptions(guard=str(place / "guard.safetensors"))


@pytest.fixture(scope="module")
def both(place: Path) -> Export:
    """Safetensors and graphs in one folder; read only."""
    formats = Formats("safetensors,onnx", "fp32,fp16,q8")
    return export_guarded(str(place / "tiny"), place / "both", options(place), formats, skip_behaviour=True)


@pytest.fixture(scope="module")
def shared(both: Export, place: Path) -> Export:
    """The guarded folder again, its graphs pointing into its weights; read only."""
    formats = Formats("safetensors,onnx", "fp16", "shared")
    return export_guarded(str(both.folder), place / "shared", formats=formats)


def test_a_folder_holds_weights_that_transformers_loads_and_graphs_that_equal_them(both: Export) -> None:
    assert both.evidence.sound and both.evidence.runtime is not None
    fp32, fp16, q8 = both.evidence.runtime.formats
    assert (fp32.precision, fp32.greedy, fp32.greedy_tokens) == ("fp32", 1, 32 * 5)
    assert max(fp32.prefill, fp32.decode) * fp32.scale <= 1e-4
    assert fp32.hooked is not None and fp32.hooked <= 1e-2
    assert fp16.prefill <= 2e-2
    assert q8.verdict is None
    manifest = json.loads((both.folder / "guardfold.json").read_text())
    assert manifest["figures"]["runtime"]["passed"] and not manifest["verified"]
    assert {f"onnx/{graph}{suffix}.onnx" for graph in GRAPHS for suffix in ("", "_fp16", "_q8", "_quantized")} <= set(
        manifest["files"]
    )
    loaded: Any = AutoModelForImageTextToText.from_pretrained(both.folder, output_loading_info=True)
    assert not any(loaded[1].values())


def test_a_guarded_folder_is_not_guarded_twice(both: Export, shared: Export) -> None:
    before, after = (json.loads((each.folder / "guardfold.json").read_text()) for each in (both, shared))
    assert after["guard"] == before["guard"]
    weights = [(each.folder / "model.safetensors").read_bytes() for each in (both, shared)]
    assert weights[0] == weights[1]
    assert shared.evidence.runtime is not None and shared.evidence.runtime.passed


def test_shared_weights_are_written_once(shared: Export) -> None:
    assert not (shared.folder / "onnx").exists()
    graph = onnx.load(shared.folder / f"{DECODER}_fp16.onnx", load_external_data=False)
    places = {
        entry.value for each in graph.graph.initializer for entry in each.external_data if entry.key == "location"
    }
    assert places == {"model.safetensors"}


def test_graphs_of_weights_that_were_changed_since_are_refused(both: Export, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(both.folder, folder)
    change_tensors(folder, lambda held: held["language_model.model.norm.weight"].mul_(2))
    with pytest.raises(InputError, match=r"model\.safetensors: differs, so it is not what was measured"):
        export_guarded(str(folder), tmp_path / "out", formats=Formats("onnx"))
    assert not (tmp_path / "out").exists()


def test_other_guard_options_for_a_guarded_folder_are_an_error(both: Export, place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is guarded already"):
        export_guarded(str(both.folder), tmp_path / "out", options(place), Formats("onnx"))


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_graphs_that_do_not_equal_torch_are_not_published(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    real = runner.Runner._embedded

    def off(self: runner.Runner, batch: Any) -> Any:
        embeds, deep = real(self, batch)
        return embeds * (factor if "pixel_values" in batch else 1), deep

    monkeypatch.setattr(runner.Runner, "_embedded", off)
    with pytest.raises(NotSafer, match=r"not sound: fp32: prefill logits differ from torch by .* nothing was written"):
        export_guarded(str(place / "tiny"), tmp_path / "out", options(place), Formats("onnx"), skip_behaviour=True)
    assert not list(tmp_path.iterdir())


def test_a_processor_that_says_other_tokens_is_noticed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_whole_counts", lambda processor: {**processor, "num_additional_image_tokens": 3})
    with pytest.raises(InputError, match=r"processor makes other tokens|image tokens"):
        export_guarded(str(place / "tiny"), tmp_path / "out", options(place), Formats("onnx"), skip_behaviour=True)
    assert not list(tmp_path.iterdir())


def test_a_guard_in_the_graphs_alone(place: Path, tmp_path: Path) -> None:
    guard = Guard((ResidualProjection({0: random_basis(1, 32), 1: random_basis(2, 32, 1)}, 1.0, 1.0),))
    guard.save(tmp_path / "residual.safetensors")
    asked = GuardOptions(guard=str(tmp_path / "residual.safetensors"))
    made = export_guarded(str(place / "tiny"), tmp_path / "out", asked, Formats("onnx"), skip_behaviour=True)
    assert made.evidence.sound and made.evidence.equivalence is None
    assert not list(made.folder.glob("*.safetensors")) and not list(made.folder.glob(".*"))
    vlm = load(place / "tiny", "cpu", torch.float32)
    batches = runtime.comparison(vlm.model, vlm.folder)
    graphs = runner.Runner(made.folder, runner.PRECISIONS["fp32"], "cpu")
    assert not runtime.agreement(graphs, batches, runtime.observe_in_torch(vlm.model, batches, guard)).failures
    assert runtime.agreement(graphs, batches, runtime.observe_in_torch(vlm.model, batches)).prefill > 1e-2


def test_clients_find_what_they_look_for(both: Export) -> None:
    read: Callable[[str], Any] = lambda name: json.loads((both.folder / name).read_text())  # noqa: E731
    assert read("config.json")["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {}}
    assert read("preprocessor_config.json")["processor_class"] == "LlavaProcessor"
    assert read("processor_config.json")["num_additional_image_tokens"] == 0
    assert not (both.folder / "genai_config.json").exists()  # onnxruntime-genai has no type for llava
    assert read("tokenizer_config.json")["chat_template"] == (both.folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--format", "gguf"), "--format 'gguf': one of safetensors, onnx, lora"),
        (("--format", "onnx", "--onnx-dtype", "int3"), "--onnx-dtype 'int3': one of fp32"),
        (("--format", "onnx", "--onnx-weights", "linked"), "--onnx-weights linked: one of copy, shared"),
        (("--format", "onnx", "--onnx-weights", "shared"), "use --format safetensors,onnx"),
        (("--format", "onnx", "--provider", "tpu", "--guard", "guard.safetensors"), "--provider tpu: one of auto, cpu"),
        (("--scope", "residual", "--format", "onnx"), "--scope residual: has no auto; use --guard projection or vlm"),
    ],
)
def test_usage_errors_are_one_line(guardfold: Command, place: Path, arguments: tuple[str, ...], said: str) -> None:
    done = guardfold("export", "--model", "tiny", "--skip-behaviour", "-o", "nowhere", *arguments, cwd=place)
    assert done.status == 2
    assert said in done.complaint
    assert not (place / "nowhere").exists()


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"--format onnx: needs the package onnxscript; pip install 'guardfold\[onnx"):
        trace.need_onnx()


def said(model: Path, text: str, image: Path | None = None, **more: Any) -> str:
    pieces: list[str] = []
    chat.answer_in_pieces(str(model), text, image, pieces.append, **more)
    assert len(pieces) > 1
    return "".join(pieces)


def test_chat_streams_the_same_words_from_either_runtime(both: Export, tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((50, 31)).convert("RGB").save(tmp_path / "picture.png")
    for image in (None, tmp_path / "picture.png"):
        in_torch = said(both.folder, "how to bake bread ?", image, runtime="torch", most=12)
        assert said(both.folder, "how to bake bread ?", image, runtime="onnx", precision="fp32", most=12) == in_torch
    assert len(in_torch.split()) >= 3


def test_chat_at_the_command_line(guardfold: Command, both: Export, place: Path) -> None:
    done = guardfold("chat", both.folder, "how to walk home ?", "--runtime", "onnx", "--max-tokens", 5, cwd=place)
    assert done.status == 0 and done.out.strip()
    done = guardfold("chat", "tiny", "hello", "--runtime", "onnx", cwd=place)
    assert (done.status, "tiny: no ONNX graphs; export them with --format onnx" in done.complaint) == (2, True)
    done = guardfold("chat", "tiny", "hello", "--image", "no.png", cwd=place)
    assert (done.status, "'no.png' is not a file" in done.complaint) == (2, True)


def test_onnxruntime_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: told.append(True))
    runner.onnxruntime()
    assert told


def test_what_is_missing_to_run_graphs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs onnxruntime; pip install"):
        runner.onnxruntime()
