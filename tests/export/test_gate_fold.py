"""A gate folded into weights is the gate as a hook: in plain transformers, for every family, placement and form."""

from __future__ import annotations

import itertools
import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from covering import covering
from gates import gated, make_gate, save_guard
from torch import Tensor
from transformers import AutoModelForImageTextToText
from zoo import FAMILIES, Tiny, name_of, random_basis, tensors

from guardfold.export.fold import WIDEN_BY
from guardfold.guard.base.errors import InputError
from guardfold.guard.interventions import Gate, SublayerProjection
from guardfold.pipeline import Export, GuardOptions, export_guarded

CLOSE = 1e-5
BETAS = (64.0, 256.0, 1024.0)
TEXTS = ("llama", "mistral", "qwen2")
BIASED = ("llama",)
"""Text models whose MLPs can have biases."""


@dataclass(frozen=True)
class Case:
    """A model with a gate, and what else the export varies."""

    tiny: Tiny
    free: bool
    recycled: bool
    beta: float
    sharded: bool
    projected: bool

    @property
    def name(self) -> str:
        flags = ("free" if self.free else "bias", "recycle" if self.recycled else "widen", f"beta{self.beta:g}")
        return "-".join([name_of(self.tiny), *flags, *["sharded"] * self.sharded, *["projected"] * self.projected])

    @property
    def gate(self) -> Gate:
        return make_gate(32, 1, free=self.free, recycled=(5, 40) if self.recycled else (), beta=self.beta)


def tried(case: Case) -> set[object]:
    """Pairs of properties, and the form that a text model and a placement give the gate together."""
    tiny, flags = case.tiny, (case.free, case.recycled, case.sharded, case.projected)
    properties = enumerate((tiny.family, tiny.text, tiny.bias, tiny.tied, tiny.kv_heads, case.beta, *flags))
    return {*itertools.combinations(properties, 2), (tiny.text, tiny.bias, case.free, case.recycled)}


def cases() -> list[Case]:
    """Every text model and placement, biased and bias-free where both exist, and every pair with the rest."""
    possible: list[Case] = []
    flags = (True, False)
    for text, bias, free, recycled in itertools.product(TEXTS, flags, flags, flags):
        if (text in BIASED or not bias) and (free or bias or (text in BIASED and not recycled)):
            for family, tied, heads, beta, sharded, projected in itertools.product(
                FAMILIES, flags, (1, 2, 4), BETAS, flags, flags
            ):
                tiny = Tiny(family, text, bias=bias, tied=tied, kv_heads=heads, seed=len(possible) % 100)
                possible.append(Case(tiny, free, recycled, beta, sharded, projected))
    return covering(possible, tried)


CASES = cases()


def load_plain(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def export(source: Path, *interventions: Any) -> Export:
    """`source` with these interventions folded in, beside it."""
    guard = save_guard(source.parent, *interventions)
    output = source.parent / "guarded"
    return export_guarded(str(source), output, GuardOptions(guard=guard), skip_behaviour=True)


def save(tiny: Tiny, folder: Path, sharded: bool = False) -> Path:
    return tiny.save(folder / "model", max_shard_size="40KB" if sharded else "5GB")


def test_the_cases_cover_what_they_say() -> None:
    widened = {(c.tiny.text, c.tiny.bias, c.free) for c in CASES if not c.recycled}
    recycled = {(c.tiny.text, c.tiny.bias, c.free) for c in CASES if c.recycled}
    assert (len(widened), len(recycled)) == (6, 5)
    assert {(c.tiny.family, c.tiny.text) for c in CASES} == set(
        itertools.product(FAMILIES, ("llama", "mistral", "qwen2"))
    )
    for flag in ("free", "sharded", "projected"):
        assert {(getattr(c, flag), c.recycled) for c in CASES} == set(itertools.product((True, False), repeat=2))
    for rest in (lambda c: c.free, lambda c: c.recycled, lambda c: c.tiny.family):
        assert {(c.beta, rest(c)) for c in CASES} == set(itertools.product(BETAS, {rest(c) for c in CASES}))
    assert {(c.tiny.tied, c.recycled) for c in CASES} == set(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_folded_weights_in_plain_transformers_equal_the_hooks(case: Case, tmp_path: Path) -> None:
    source = save(case.tiny, tmp_path, case.sharded)
    assert len(list(source.glob("*.safetensors"))) > 1 or not case.sharded
    bases = {1: random_basis(1, 32, 8), 2: random_basis(2, 32, 9)} if case.projected else {}
    projection = [SublayerProjection(bases, 0.5)] if bases else []
    result = export(source, *projection, case.gate)
    original, folded, edits = load_plain(source), load_plain(result.folder), []
    for batch in reference.batches(case.tiny.processor()).values():
        with gated_after(original, bases, case.gate):
            expected = reference.logits(original, batch)
        assert reference.distance(reference.logits(folded, batch), expected) <= CLOSE
        edits.append(reference.distance(reference.logits(original, batch), expected))
    assert max(edits) > 100 * CLOSE


def gated_after(model: Any, bases: dict[int, Tensor], gate: Gate) -> ExitStack:
    """The projection, then the gate; recycled neurons are gone before either."""
    stack = ExitStack()
    plain = replace(gate, column=torch.zeros(32)) if gate.recycled else None
    if plain:
        stack.enter_context(gated(model, plain))
    if bases:
        stack.enter_context(reference.projected_sublayers(model, bases, 0.5))
    stack.enter_context(gated(model, replace(gate, recycled=())))
    return stack


STEEP = [(beta, free, at % 2 == free) for at, beta in enumerate(BETAS) for free in (False, True)]
"""Every pair of a steepness with a form and with a placement."""


@pytest.mark.parametrize(("beta", "free", "recycle"), STEEP)
def test_every_steepness_in_every_form(tmp_path: Path, beta: float, free: bool, recycle: bool) -> None:
    recycled = (5, 40) if recycle else ()
    gate = make_gate(beta=beta, free=free, recycled=recycled, seed=4)
    source = save(Tiny(), tmp_path)
    original, folded = load_plain(source), load_plain(export(source, gate).folder)
    batch = reference.batches(Tiny().processor())["image"]
    with gated(original, gate):
        assert reference.distance(reference.logits(folded, batch), reference.logits(original, batch)) <= CLOSE


MLP = "language_model.model.layers.1.mlp."


@pytest.mark.parametrize("bias", [True, False])
def test_recycling_changes_two_neurons_and_nothing_else(tmp_path: Path, bias: bool) -> None:
    source = save(Tiny(bias=bias), tmp_path)
    folder = export(source, make_gate(free=not bias, recycled=(5, 40))).folder
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    before, after = tensors(source), tensors(folder)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    biases = {MLP + "gate_proj.bias", MLP + "up_proj.bias"} if bias else set()
    assert changed == {MLP + f"{part}_proj.weight" for part in ("gate", "up", "down")} | biases
    for name in changed:
        columns = before[name] != after[name]
        neurons = columns.any(0) if "down" in name else columns if columns.ndim == 1 else columns.any(1)
        assert neurons.nonzero().flatten().tolist() == [5, 40]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_widening_adds_256_neurons_to_every_layer_all_but_two_of_them_zero(
    tmp_path: Path, text: str, free: bool, bias: bool
) -> None:
    if text == "qwen2" and (bias or not free):
        tiny, free = Tiny(text=text, bias=False, tied=bias), True
    else:
        tiny = Tiny(text=text, bias=bias)
    source = save(tiny, tmp_path)
    folder = export(source, make_gate(free=free)).folder
    config, was = (json.loads((f / "config.json").read_text()) for f in (folder, source))
    expected = {**was["text_config"], "intermediate_size": 48 + WIDEN_BY}
    if text == "llama":
        expected["mlp_bias"] = bias or not free
    assert WIDEN_BY == 256
    assert config == {**was, "text_config": expected}
    before, after = tensors(source), tensors(folder)
    biased = text == "llama" and (bias or not free)
    for layer in range(3):
        mlp = f"language_model.model.layers.{layer}.mlp."
        assert (mlp + "up_proj.bias" in after) == biased
        for part in ("gate", "up", "down"):
            for kind in ("weight", "bias") if biased else ("weight",):
                new, old = after[f"{mlp}{part}_proj.{kind}"], before.get(f"{mlp}{part}_proj.{kind}")
                if part == "down" and kind == "bias":
                    assert torch.equal(new, old if old is not None else torch.zeros(32))
                    continue
                new = new.T if part == "down" else new
                assert new.shape[0] == 48 + WIDEN_BY
                kept = torch.zeros_like(new[:48]) if old is None else old.T if part == "down" else old
                assert torch.equal(new[:48], kept)
                assert not new[(50 if layer == 1 else 48) :].any()
    others = {name for name in before if ".mlp." not in name or "vision" in name}
    assert {name for name in after if name in others} == others
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("free", [True, False])
def test_a_widened_gate_with_nothing_to_write_leaves_the_model_as_it_was(tmp_path: Path, free: bool) -> None:
    source = save(Tiny(bias=False), tmp_path)
    folder = export(source, replace(make_gate(free=free), column=torch.zeros(32))).folder
    original, folded = load_plain(source), load_plain(folder)
    for batch in reference.batches(Tiny().processor()).values():
        assert reference.distance(reference.logits(folded, batch), reference.logits(original, batch)) <= 1e-6


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
def test_a_gate_that_needs_biases_cannot_take_the_place_of_neurons_without(tmp_path: Path, text: str) -> None:
    source = save(Tiny(text=text, bias=False), tmp_path)
    with pytest.raises(InputError, match="has no bias, which this gate needs; use its bias-free form") as error:
        export(source, make_gate(recycled=(5, 40)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "guarded").exists()


def test_a_gate_that_needs_biases_cannot_widen_a_family_without_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use its bias-free form"):
        export(save(Tiny(text="qwen2"), tmp_path), make_gate())


def test_a_neuron_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neuron 48 is out of range; the MLP has 48"):
        export(save(Tiny(), tmp_path), make_gate(recycled=(0, 48)))


def test_two_gates_in_two_layers_one_biased_one_free(tmp_path: Path) -> None:
    first, second = make_gate(layer=0), make_gate(layer=2, free=True, recycled=(1, 2), seed=5)
    source = save(Tiny(bias=False), tmp_path)
    original, folded = load_plain(source), load_plain(export(source, first, second).folder)
    batch = reference.batches(Tiny().processor())["image"]
    with gated(original, first), gated(original, second):
        assert reference.distance(reference.logits(folded, batch), reference.logits(original, batch)) <= CLOSE
