"""`--format lora` and `--adapter` from end to end: what is published, what is measured, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapted, loaded, tuned
from command import Command
from gates import make_gate, save_guard
from reference import batches, distance, logits
from safetensors.torch import load_file, save_file
from zoo import Tiny, random_basis, tensors

from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.guard.model.vlm import load
from guardfold.validators.demo import DEMO

SUBLAYERS = SublayerProjection({1: random_basis(2, 32), 2: random_basis(1, 32, 1)}, 0.7)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(tied=True, seed=3).save(tmp_path_factory.mktemp("adapter") / "tied")


@pytest.mark.parametrize(("base", "whole"), [("tiny_folder", False), ("tied", True)])
def test_an_export_is_an_adapter_equal_to_its_hooks(
    guardfold: Command, request: pytest.FixtureRequest, tmp_path: Path, base: str, whole: bool
) -> None:
    """Biases everywhere: an adapter of its own for the layers that have them."""
    model = request.getfixturevalue(base)
    guard = Guard((SharedProjection(random_basis(2, 32)) if whole else SUBLAYERS,))
    guard.save(tmp_path / "guard.safetensors")
    export = ("export", "-m", model, "-g", "guard.safetensors", "--format", "lora", "--skip-behaviour", "-o", "out")
    done = guardfold(*export, cwd=tmp_path)
    assert done.status == 0, done.err
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "guardfold.json", "README.md", "report.html"} <= names
    assert "guardfold/guard.safetensors" in names and not {"config.json", "model.safetensors"} & names
    manifest = json.loads((out / "guardfold.json").read_text())
    assert (manifest["format"], manifest["left_out"], manifest["verified"]) == ("lora", [], False)
    assert set(manifest["files"]) == names - {"guardfold.json"}
    figures = manifest["figures"]["equivalence"]
    assert figures["passed"] and figures["folded"] <= 1e-5 < figures["edit"] and figures["greedy"] == 1
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card and f'AutoProcessor.from_pretrained("{model.name}")' in card
    assert not (out / "tokenizer.json").exists()
    vlm = load(model, "cpu", torch.float32)
    with_adapter = adapted(loaded(model), out)
    for batch in batches(vlm.processor).values():
        with attached(vlm.model, guard):
            assert distance(logits(with_adapter, batch), logits(vlm.model, batch)) <= 1e-5
    assert guardfold("check", out, "--against", model, "--skip-behaviour", cwd=tmp_path).status == 0


def test_a_changed_adapter_is_found_out(guardfold: Command, tiny_folder: Path, tmp_path: Path) -> None:
    export = ("export", "-m", tiny_folder, "-g", save_guard(tmp_path, SUBLAYERS), "--format", "lora", "-o", "out")
    assert guardfold(*export, "--skip-behaviour", cwd=tmp_path).status == 0
    for place in ("", "biased"):
        out = Path(shutil.copytree(tmp_path / "out", tmp_path / f"changed{place}"))
        path = out / place / "adapter_model.safetensors"
        if not path.exists():
            continue
        held = load_file(path)
        name = next(name for name in held if name.endswith("lora_B.weight"))
        held[name][0, 0] += 0.5
        save_file(held, path)
        done = guardfold("check", out, "--against", tiny_folder, "--skip-behaviour", cwd=tmp_path)
        assert done.status == 3 and "differ by" in done.out


def test_a_gate_is_left_out_only_when_allowed(guardfold: Command, tiny_folder: Path, tmp_path: Path) -> None:
    both = save_guard(tmp_path, SUBLAYERS, make_gate(recycled=(1, 2)))
    export = ("export", "-m", tiny_folder, "--format", "lora", "--skip-behaviour", "-o", "out")
    done = guardfold(*export, "-g", both, cwd=tmp_path)
    assert done.status == 2 and "gate (layer 1): adds neurons" in done.complaint and "--allow-partial" in done.complaint
    assert not (tmp_path / "out").exists()
    assert guardfold(*export, "-g", both, "--allow-partial", cwd=tmp_path).status == 0
    manifest = json.loads((tmp_path / "out" / "guardfold.json").read_text())
    assert manifest["left_out"][0].startswith("gate (layer 1)")
    assert [each["kind"] for each in manifest["guard"]["interventions"]] == ["sublayer-projection"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "only a part of the guard" in card and "gate (layer 1)" in card
    alone = save_guard(tmp_path, make_gate(recycled=(1, 2)))
    done = guardfold(*export, "-g", alone, "--allow-partial", "--overwrite", cwd=tmp_path)
    assert done.status == 2 and "no adapter holds any of this guard" in done.complaint


def test_a_vector_is_left_out_only_when_allowed(guardfold: Command, tmp_path: Path) -> None:
    model = Tiny("llava_next", seed=5).save(tmp_path / "model")
    export = ("export", "-m", model, "--format", "lora", "--skip-behaviour", "-o", "out")
    guard = save_guard(tmp_path, SharedProjection(random_basis(1, 32), 0.5))
    done = guardfold(*export, "-g", guard, cwd=tmp_path)
    assert done.status == 2 and "image_newline" in done.complaint
    done = guardfold(*export, "-g", guard, "--allow-partial", cwd=tmp_path)
    assert done.status == 0, done.err
    manifest = json.loads((tmp_path / "out" / "guardfold.json").read_text())
    assert "image_newline" in manifest["left_out"][0]
    equal = manifest["figures"]["equivalence"]
    assert equal["folded"] <= 1e-5 < equal["exact"] and "image_newline" in equal["approximate"]
    assert guardfold("check", "out", "--against", model, "--skip-behaviour", cwd=tmp_path).status == 0
    done = guardfold(*export, "-g", guard, "--allow-partial", "--strict", "--overwrite", cwd=tmp_path)
    assert done.status == 3 and "--strict" in done.complaint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "gguf"), "one of safetensors, onnx, lora"),
        (("--format", "lora"), "the preset auto has a gate"),
        (("--format", "lora", "-g", "projection", "--adapter", "user"), "leave one out"),
        (("--adapter", "no_such_folder"), "no such folder"),
        (("--adapter", "."), "no adapter_config.json"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    guardfold: Command, tiny_folder: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = guardfold("export", "-m", tiny_folder, "-o", "out", *options, cwd=tmp_path)
    assert done.status == 2 and said in done.complaint
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a DoRA adapter of the demo, the demo with it merged by PEFT and rounded to the demo's float16)."""
    folder = tmp_path_factory.mktemp("tune")
    pattern = r".*language_model.*\.(q_proj|o_proj|down_proj)"
    tuned(DEMO, folder / "user", target_modules=pattern, use_dora=True).merge_and_unload().half().save_pretrained(
        folder / "merged", save_original_format=True
    )
    for path in DEMO.iterdir():
        if not (folder / "merged" / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / "merged" / path.name)
    return folder / "user", folder / "merged"


def test_a_fine_tune_guarded_is_merged_then_guarded(
    guardfold: Command, fine_tune: tuple[Path, Path], tmp_path: Path
) -> None:
    user, merged = fine_tune
    export = ("export", "-g", "projection", "--layers", "2,3", "--skip-behaviour")
    for name, model in (("ours", ("-m", "demo", "--adapter", user)), ("theirs", ("-m", merged))):
        done = guardfold(*export, *model, "-o", name, cwd=tmp_path)
        assert done.status == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        step = torch.finfo(torch.float16).eps * (1 + tensor.abs().max())
        assert ours[name].dtype == tensor.dtype and (ours[name] - tensor).abs().max() <= 2 * step, name
    manifest: dict[str, Any] = json.loads((tmp_path / "ours" / "guardfold.json").read_text())
    assert manifest["source"]["model"] == "demo" and manifest["source"]["adapter"]["name"] == "user"
    assert len(manifest["source"]["adapter"]["sha256"]) == 64
    check = ("check", "ours", "--skip-behaviour", "--against", "demo")
    assert guardfold(*check, "--adapter", user, cwd=tmp_path).status == 0
    assert guardfold(*check, cwd=tmp_path).status == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_extraction_takes_an_adapter_too(guardfold: Command, fine_tune: tuple[Path, Path], tmp_path: Path) -> None:
    extract = ("extract", "-m", "demo", "-g", "projection", "--layers", "3")
    assert guardfold(*extract, "--adapter", fine_tune[0], "-o", "ours.safetensors", cwd=tmp_path).status == 0
    assert guardfold(*extract, "-o", "plain.safetensors", cwd=tmp_path).status == 0
    ours, plain = (Guard.load(tmp_path / f"{name}.safetensors") for name in ("ours", "plain"))
    assert ours.provenance["model"] == "demo with user" and plain.provenance["model"] == "demo"
    assert not torch.allclose(ours.interventions[0].tensors()["3"], plain.interventions[0].tensors()["3"], atol=1e-3)


def test_an_adapter_is_measured_like_any_other_and_refused_if_weaker(guardfold: Command, tmp_path: Path) -> None:
    lines = (DEMO / "probes.jsonl").read_text().splitlines()
    harmful = [line for line in lines if json.loads(line)["harmful"]][:60]
    benign = [line for line in lines if not json.loads(line)["harmful"]][:20]
    (tmp_path / "few.jsonl").write_text("\n".join(harmful + benign) + "\n")
    export = ("export", "-m", "demo", "-g", "projection", "--format", "lora", "--probes", "few.jsonl")
    done = guardfold(*export, "-o", "out", cwd=tmp_path)
    assert done.status == 3 and "not safer" in done.err and "significantly higher" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
