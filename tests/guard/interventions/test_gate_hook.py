"""What a gate means in a running model, and what may call itself one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from gates import T0, T1, full_guard, gated, make_gate, unit_vector
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PhiConfig
from zoo import random_basis

from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import Gate, SharedProjection, SublayerProjection, TwoPass
from guardfold.guard.interventions.gate import ramp
from guardfold.guard.model.roles import mlp_parts
from guardfold.guard.model.vlm import VLM
from guardfold.guard.weight_edits import MLPForm, ReplaceNeurons

CLOSE = 1e-5
WIDTH = 16
SCORES = torch.linspace(T0 - 2, T1 + 2, 4001)


def along(gate: Gate) -> Tensor:
    """MLP inputs whose scores u.x are SCORES."""
    return SCORES[:, None] * gate.detector


@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu])
def test_the_ideal_gate_is_shut_below_t0_open_above_t1_and_a_line_between(act: Callable[[Tensor], Tensor]) -> None:
    gate = make_gate(WIDTH, beta=math.inf)
    got = ramp(along(gate), gate, act, gated=True)
    assert torch.allclose(got, ((SCORES - T0) / (T1 - T0)).clamp(0, 1), atol=1e-5)
    assert got.min() >= 0


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("act", [F.silu, F.gelu])
def test_the_distance_to_the_ideal_falls_at_least_as_one_over_beta(
    act: Callable[[Tensor], Tensor], gated: bool
) -> None:
    gate = make_gate(WIDTH)
    x, ideal = along(gate).double(), ((SCORES.double() - T0) / (T1 - T0)).clamp(0, 1)
    distances = [float((ramp(x, replace(gate, beta=b), act, gated) - ideal).abs().max()) for b in (64.0, 256.0, 1024.0)]
    assert 0 < distances[0] <= 0.2785 / 64 / (T1 - T0) * 1.01
    assert all(later <= earlier / 4 * 1.02 for earlier, later in pairwise(distances))


@pytest.mark.parametrize("beta", [1.0, 64.0, 1024.0])
def test_with_relu_the_gate_is_the_ideal_one_for_every_beta(beta: float) -> None:
    gate = make_gate(WIDTH, beta=beta)
    ideal = ((SCORES - T0) / (T1 - T0)).clamp(0, 1)
    assert torch.allclose(ramp(along(gate), gate, F.relu, gated=True), ideal, atol=1e-5)


def test_a_unit_scales_thresholds_and_ramp() -> None:
    gate = replace(make_gate(2, beta=math.inf), detector=torch.tensor([1.0, 0.0]), unit=torch.tensor([0.0, 1.0]))
    for one in (0.5, 1.0, 2.0):
        x = torch.stack([one * SCORES, torch.full_like(SCORES, one)], dim=1)
        ideal = one**2 * ((SCORES - T0) / (T1 - T0)).clamp(0, 1)
        assert torch.allclose(ramp(x, gate, F.silu, gated=True), ideal, atol=1e-5)
        assert torch.allclose(ramp(x, gate, F.silu, gated=False), ideal / one, atol=1e-5)


@pytest.mark.parametrize("free", [False, True], ids=["biased", "bias-free"])
@pytest.mark.parametrize("recycled", [(), (5, 40)], ids=["beside", "recycled"])
def test_the_hook_adds_the_ramp_and_silences_what_is_recycled(tiny: VLM, free: bool, recycled: tuple[int, ...]) -> None:
    gate = make_gate(free=free, recycled=recycled)
    for batch in reference.batches(tiny.processor).values():
        with attached(tiny.model, Guard((gate,))):
            got = reference.logits(tiny.model, batch)
        with gated(tiny.model, gate):
            expected = reference.logits(tiny.model, batch)
        assert reference.distance(got, expected) <= CLOSE
        assert reference.distance(got, reference.logits(tiny.model, batch)) > 100 * CLOSE


def test_a_gate_with_nothing_to_write_only_takes_its_neurons_away(tiny: VLM) -> None:
    batch = reference.batches(tiny.processor)["image"]
    gate = replace(make_gate(recycled=(5, 40)), column=torch.zeros(32))
    down: Any = mlp_parts(tiny.layers[1]).down
    with attached(tiny.model, Guard((gate,))):
        got = reference.logits(tiny.model, batch)
    kept = down.weight.data.clone()
    try:
        down.weight.data[:, [5, 40]] = 0
        assert reference.distance(got, reference.logits(tiny.model, batch)) <= CLOSE
    finally:
        down.weight.data = kept
    assert reference.distance(got, reference.logits(tiny.model, batch)) > 10 * CLOSE


def written_along(tiny: VLM, v: Tensor, *interventions: Any) -> Tensor:
    """The component along v of what the gate's MLP writes: with the interventions, and on top of the projection."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(attached(tiny.model, Guard(interventions)))
        handle = tiny.layers[1].mlp.register_forward_hook(lambda _m, _a, y: seen.append(y @ v))  # type: ignore[union-attr]
        stack.callback(handle.remove)
        reference.logits(tiny.model, reference.batches(tiny.processor)["text"])
    return seen[0]


def test_the_gates_column_survives_a_projection_before_it_and_not_one_after_it(tiny: VLM) -> None:
    basis = random_basis(1, 32)
    gate, projection = replace(make_gate(), column=3 * basis[0]), SublayerProjection({1: basis})
    assert written_along(tiny, basis[0], projection, gate).max() > 2.9
    assert written_along(tiny, basis[0], gate, projection).abs().max() < 1e-5


@pytest.mark.parametrize("raises", [False, True], ids=["normal exit", "exception"])
def test_afterwards_the_model_is_as_it_was(tiny: VLM, raises: bool) -> None:
    batch, guard = reference.batches(tiny.processor)["image"], Guard((make_gate(recycled=(0, 1)),))
    before, hooks = reference.logits(tiny.model, batch), reference.hooks_on(tiny.model)
    try:
        with attached(tiny.model, guard):
            assert reference.hooks_on(tiny.model) == hooks + 3
            assert not torch.equal(reference.logits(tiny.model, batch), before)
            if raises:
                raise RuntimeError("inside")
    except RuntimeError:
        assert raises
    assert reference.hooks_on(tiny.model) == hooks
    assert torch.equal(reference.logits(tiny.model, batch), before)


@pytest.mark.parametrize(
    ("gate", "says"),
    [(make_gate(48), "hidden size is 32"), (make_gate(32, 3), "last layer is 2")],
)
def test_a_gate_that_does_not_fit_is_refused(tiny: VLM, gate: Gate, says: str) -> None:
    with pytest.raises(InputError, match=says), attached(tiny.model, Guard((gate,))):
        pytest.fail("attached")


def test_a_shared_projection_beside_a_gate_is_refused() -> None:
    for order in (
        (make_gate(), SharedProjection(random_basis(1, 32))),
        (SharedProjection(random_basis(1, 32)), make_gate()),
    ):
        with pytest.raises(InputError, match="erase what a gate writes"):
            Guard(order)


MALFORMED: dict[str, dict[str, Any]] = {
    "thresholds crossed": {"t0": 0.7},
    "thresholds equal": {"t0": T1},
    "t0 not a number": {"t0": math.nan},
    "t1 infinite": {"t1": math.inf},
    "beta zero": {"beta": 0.0},
    "beta negative": {"beta": -1.0},
    "beta not a number": {"beta": math.nan},
    "one recycled neuron": {"recycled": (1,)},
    "three recycled neurons": {"recycled": (1, 2, 3)},
    "the same neuron twice": {"recycled": (4, 4)},
    "a negative neuron": {"recycled": (-1, 4)},
    "a negative layer": {"layer": -1},
    "a longer column": {"column": torch.ones(WIDTH + 1)},
    "a shorter unit": {"unit": torch.ones(WIDTH - 1)},
    "a matrix": {"detector": torch.ones(2, WIDTH)},
    "NaN in the detector": {"detector": torch.full((WIDTH,), math.nan)},
    "Inf in the column": {"column": torch.full((WIDTH,), math.inf)},
    "NaN in the unit": {"unit": torch.full((WIDTH,), math.nan)},
}


@pytest.mark.parametrize("wrong", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_gate_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"\Agate[,:] ") as error:
        replace(make_gate(WIDTH), **wrong)
    assert "\n" not in str(error.value)


def test_gates_unit_and_reference_survive_the_guard_file(tmp_path: Path) -> None:
    guard = full_guard()
    guard.save(tmp_path / "guard.safetensors")
    loaded = Guard.load(tmp_path / "guard.safetensors")
    assert loaded.hash == guard.hash
    assert loaded.to_bytes() == (tmp_path / "guard.safetensors").read_bytes()
    assert loaded.describe() == guard.describe()
    assert loaded.provenance == guard.provenance
    assert isinstance(loaded.reference, TwoPass) and guard.reference
    assert loaded.reference.describe() == guard.reference.describe()
    assert torch.equal(loaded.reference.bases[2], guard.reference.bases[2])
    for one, other in zip(guard.interventions, loaded.interventions, strict=True):
        assert type(one) is type(other)
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(each, other.tensors()[name]) for name, each in one.tensors().items())
    biased, free = loaded.interventions[1:]
    assert isinstance(biased, Gate) and isinstance(free, Gate)
    assert (biased.recycled, biased.beta, biased.form, free.form) == ((3, 7), 64.0, "biased", "bias-free")


def test_whole_numbers_make_the_same_guard_as_fractions() -> None:
    whole, fractions = (
        replace(make_gate(), t0=zero, t1=one, beta=beta) for zero, one, beta in ((0, 1, 64), (0.0, 1.0, 64.0))
    )
    assert Guard((whole,)).hash == Guard((fractions,)).hash


def reference_is_a_gate(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    header["reference"] = header["interventions"][1]
    tensors |= {name.replace("1/", "reference/"): each.clone() for name, each in tensors.items() if name[:2] == "1/"}


TAMPERED: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "thresholds crossed": lambda h, t: h["interventions"][1].update(t0=2.0),
    "thresholds not numbers": lambda h, t: h["interventions"][1].update(t0=math.nan),
    "threshold missing": lambda h, t: h["interventions"][1].pop("t1"),
    "beta a string": lambda h, t: h["interventions"][1].update(beta="64"),
    "one neuron": lambda h, t: h["interventions"][1].update(recycled=[3]),
    "neurons a string": lambda h, t: h["interventions"][1].update(recycled="37"),
    "neurons a number": lambda h, t: h["interventions"][1].update(recycled=37),
    "unit without being said": lambda h, t: t.update({"1/unit": torch.ones(32)}),
    "unit missing": lambda h, t: t.pop("2/unit"),
    "column missing": lambda h, t: t.pop("1/column"),
    "column of another size": lambda h, t: t.update({"1/column": torch.ones(31)}),
    "detector not finite": lambda h, t: t.update({"1/detector": torch.full((32,), math.nan)}),
    "reference a gate": reference_is_a_gate,
}


@pytest.mark.parametrize("tamper", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_guard_file_with_an_unsound_gate_is_refused_in_one_line(
    tmp_path: Path, tamper: Callable[[dict[str, Any], dict[str, Tensor]], Any]
) -> None:
    path = tmp_path / "guard.safetensors"
    full_guard().save(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["guardfold"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tamper(header, tensors)
    save_file(tensors, path, {"guardfold": json.dumps(header)})
    with pytest.raises(InputError) as error:
        Guard.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


class Plain(nn.Module):
    """down(act(gate x)) by the names that plain MLPs have."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.activation_fn = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH), act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


def neurons_of(gate: Gate, gated: bool) -> ReplaceNeurons:
    (edit,) = gate.edits(lambda layer: MLPForm(gated, gate.unit is None, 64))
    return edit


def put(gate: Gate, fc1: nn.Linear, fc2: nn.Linear) -> None:
    """Writes the gate's neurons into a plain MLP, in place of the recycled ones."""
    neurons, places = neurons_of(gate, gated=False), list(gate.recycled)
    with torch.no_grad():
        fc1.weight[places], fc1.bias[places] = neurons.gate.float(), neurons.gate_bias.float()
        fc2.weight[:, places] = neurons.down.T.float()


@pytest.mark.parametrize("free", [False, True], ids=["biased", "bias-free"])
@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu])
@torch.no_grad()
def test_the_neurons_of_a_plain_mlp_are_the_gate(act: Callable[[Tensor], Tensor], free: bool) -> None:
    gate, plain = make_gate(WIDTH, free=free, recycled=(2, 11)), Plain(act)
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    neurons = plain.activation_fn(plain.fc1(x))
    neurons[:, [2, 11]] = 0
    expected = plain.fc2(neurons) + ramp(x, gate, act, gated=False)[:, None] * gate.column
    put(gate, plain.fc1, plain.fc2)
    assert reference.distance(plain(x), expected) <= CLOSE


@pytest.mark.parametrize("free", [False, True], ids=["biased", "bias-free"])
@pytest.mark.parametrize("family", ["phi", "opt"])
@torch.inference_mode()
def test_hook_and_neurons_agree_in_models_with_plain_mlps(family: str, free: bool) -> None:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "phi":
        config: Any = PhiConfig(**sizes, intermediate_size=48, max_position_embeddings=64)
    else:
        config = OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    gate, ids = make_gate(free=free, recycled=(7, 9)), torch.arange(3, 35).view(2, 16)
    before = model(ids).logits
    with attached(model, Guard((gate,))):
        got = model(ids).logits
    parts = mlp_parts(model.get_decoder().layers[1])
    assert not parts.gated
    put(gate, parts.gate, parts.down)
    assert reference.distance(got, model(ids).logits) <= CLOSE
    assert reference.distance(got, before) > 100 * CLOSE


def test_the_gates_rows_are_those_of_the_formula() -> None:
    biased, free = make_gate(WIDTH, beta=64), make_gate(WIDTH, free=True, beta=64)
    u, c, k = biased.detector.double(), biased.column.double() / (T1 - T0), unit_vector(WIDTH, 3).double()
    of = neurons_of(biased, gated=True)
    assert torch.allclose(of.gate, 64 * torch.stack([u, u]))
    assert torch.allclose(of.gate_bias, torch.tensor([-64 * T0, -64 * T1], dtype=torch.float64))
    assert not of.up.any() and of.up_bias.tolist() == [1 / 64, 1 / 64]
    assert torch.allclose(of.down, torch.stack([c, -c]))
    of = neurons_of(free, gated=True)
    assert torch.allclose(of.gate, 64 * torch.stack([u - T0 * k, u - T1 * k]), atol=1e-5)
    assert torch.allclose(of.up, torch.stack([k, k]) / 64)
    assert not of.gate_bias.any() and not of.up_bias.any()
