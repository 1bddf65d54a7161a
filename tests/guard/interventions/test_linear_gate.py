"""The linear gate: one meaning as a hook, in weights, and as an adapter; fitted to open where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters import adapted, loaded
from command import Command
from gates import readings, save_guard, unit_vector
from reference import batches, distance, logits
from zoo import random_basis

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting.linear_probe import fit_readout
from guardfold.guard.fitting.transcripts import Place
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import LinearGate, SharedProjection, SublayerProjection
from guardfold.guard.model.vlm import VLM, load

NEURONS = 48
GATE = LinearGate(1, unit_vector(NEURONS, 1), 3 * unit_vector(32, 2))


def test_the_hook_is_a_rank_one_change_of_the_output_matrix(tiny: VLM) -> None:
    down = tiny.model.model.language_model.layers[1].mlp.down_proj
    kept = down.weight.data
    for batch in batches(tiny.processor).values():
        before = logits(tiny.model, batch)
        with attached(tiny.model, Guard((GATE,))):
            hooked = logits(tiny.model, batch)
        down.weight.data = kept + GATE.column[:, None] * GATE.readout[None]
        try:
            changed = logits(tiny.model, batch)
        finally:
            down.weight.data = kept
        assert distance(changed, hooked) <= 1e-5 < 1e-2 < distance(before, hooked)
        assert torch.equal(logits(tiny.model, batch), before)


def test_it_survives_its_file_and_is_checked(tmp_path: Path, tiny: VLM) -> None:
    path = save_guard(tmp_path, SublayerProjection({0: random_basis(1, 32)}), GATE)
    again = Guard.load(Path(path)).interventions[1]
    assert isinstance(again, LinearGate) and again.layer == 1
    assert torch.equal(again.readout, GATE.readout) and torch.equal(again.column, GATE.column)
    with pytest.raises(InputError, match="would erase"):
        Guard((SharedProjection(random_basis(1, 32)), GATE))
    narrow = Guard((LinearGate(1, torch.ones(5), torch.ones(32)),))
    with pytest.raises(InputError, match="reads 5 neurons"), attached(tiny.model, narrow):
        pytest.fail("attached")


@pytest.mark.parametrize("form", ["safetensors", "lora"])
def test_weights_and_adapter_equal_the_hooks(guardfold: Command, tiny_folder: Path, tmp_path: Path, form: str) -> None:
    """Together with a projection of the same matrix, which comes first."""
    path = save_guard(tmp_path, SublayerProjection({1: random_basis(1, 32)}), GATE)
    export = ("export", "-m", tiny_folder, "-g", path, "--format", form, "--skip-behaviour", "-o", "out")
    done = guardfold(*export, cwd=tmp_path)
    assert done.status == 0, done.err
    vlm = load(tiny_folder, "cpu", torch.float32)
    model = loaded(tmp_path / "out") if form == "safetensors" else adapted(loaded(tiny_folder), tmp_path / "out")
    for batch in batches(vlm.processor).values():
        with attached(vlm.model, Guard.load(Path(path))):
            assert distance(logits(model, batch), logits(vlm.model, batch)) <= 1e-5


def test_a_gate_of_another_width_is_refused(guardfold: Command, tiny_folder: Path, tmp_path: Path) -> None:
    path = save_guard(tmp_path, LinearGate(1, torch.ones(5), torch.ones(32)))
    done = guardfold("export", "-m", tiny_folder, "-g", path, "--skip-behaviour", "-o", "out", cwd=tmp_path)
    assert done.status == 2 and "the gate reads 5 neurons" in done.complaint


def test_the_readout_opens_where_it_should_and_shuts_the_more_it_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    elsewhere = readings({place: torch.randn(300, 12, generator=draw) for place in (Place.TEXT, Place.ANSWER)})
    positives = torch.randn(100, 12, generator=draw) + 2 * unit_vector(12, 3)
    found = [fit_readout(positives, elsewhere, weight) for weight in (1.0, 16.0)]
    loose, tight = (float((elsewhere.x @ g).square().mean()) for g in found)
    open_loose, open_tight = (float((positives @ g).mean()) for g in found)
    assert tight < loose < 0.5 and 0 < open_tight < open_loose < 1
    moved = [g + 0.01 * unit_vector(12, seed) for g in found[:1] for seed in range(5)]

    def loss(g: torch.Tensor) -> float:
        spent = sum((elsewhere.at(p) @ g).square().mean() for p in (Place.TEXT, Place.ANSWER))
        return float((positives @ g - 1).square().mean() + spent)

    assert all(loss(found[0]) < loss(each) for each in moved)
    with pytest.raises(InputError, match="nothing to fit"):
        fit_readout(positives[:0], elsewhere, 1.0)


@pytest.mark.rebuild
def test_the_demo_guarded_by_an_adapter_is_safer(guardfold: Command, tmp_path: Path) -> None:
    """The one preset that an adapter holds and that protects: two kilobytes on the unmodified demo."""
    done = guardfold("export", "-m", "demo", "-g", "linear", "--format", "lora", "-o", "out", cwd=tmp_path)
    assert done.status == 0, done.err
    manifest = json.loads((tmp_path / "out" / "guardfold.json").read_text())
    assert (manifest["verdict"], manifest["verified"], manifest["left_out"]) == ("safer", True, [])
    figures = manifest["figures"]
    for kind in ("blank", "noise", "shape", "typographic"):
        was, now = (figures[who][kind]["complied"]["rate"] for who in ("original", "guarded"))
        assert now <= 0.2 * was
    assert max(figures["effects"]["kl"].values()) <= 0.01
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 10_000
