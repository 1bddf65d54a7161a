"""Gates drawn at random, and what a gate does to a running model, written a second time and without the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import random_basis

from guardfold.guard.fitting.transcripts import Place, Readings
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import Gate, SublayerProjection, TwoPass
from guardfold.guard.model.vlm import VLM, load

T0, T1 = -0.3, 0.6
"""Thresholds that the scores of a tiny random model, about normal, lie below, between and above."""


def unit_vector(width: int, seed: int) -> Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def make_gate(
    width: int = 32,
    layer: int = 1,
    *,
    free: bool = False,
    recycled: Sequence[int] = (),
    beta: float = 256.0,
    seed: int = 0,
    height: float = 5.0,
) -> Gate:
    """A gate at random; `free` gives it a unit k, so that it needs no biases."""
    return Gate(
        layer,
        unit_vector(width, seed + 1),
        height * unit_vector(width, seed + 2),
        T0,
        T1,
        unit=unit_vector(width, seed + 3) if free else None,
        recycled=tuple(recycled),
        beta=beta,
    )


def full_guard(width: int = 32) -> Guard:
    """A guard of every kind that a file holds: projection, biased and bias-free gate, two-pass reference."""
    return Guard(
        (
            SublayerProjection({0: random_basis(2, width, 5)}, 0.5),
            make_gate(width, 1, recycled=(3, 7), beta=64.0),
            make_gate(width, 2, free=True, seed=9),
        ),
        {"selection": {"why": "é", "candidates": [{"gain": 1.0}]}},
        TwoPass({2: random_basis(1, width, 6)}, alpha=1.5, project=True),
    )


def opened(x: Tensor, gate: Gate, act: Callable[[Tensor], Tensor], gated: bool = True) -> Tensor:
    """The ramp at x [..., d], as two neurons of the MLP would compute it, one after the other."""
    one = torch.ones_like(x[..., 0]) if gate.unit is None else x @ gate.unit
    first, second = (act(gate.beta * (x @ gate.detector) - gate.beta * t * one) for t in (gate.t0, gate.t1))
    return (first - second) * (one if gated else 1.0) / (gate.beta * (gate.t1 - gate.t0))


@contextmanager
def gated(model: Any, gate: Gate) -> Iterator[None]:
    """`gate` on a Llama-like VLM, all in one hook: what the recycled neurons wrote goes, what the gate writes comes."""
    mlp = model.model.language_model.layers[gate.layer].mlp
    lost = list(gate.recycled)

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        neurons = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        output = output - neurons[..., lost] @ mlp.down_proj.weight[:, lost].T
        return output + opened(x, gate, mlp.act_fn)[..., None] * gate.column

    handle = mlp.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def save_guard(folder: Path, *interventions: Any) -> str:
    """A guard file of these interventions."""
    path = folder / "guard.safetensors"
    Guard(interventions).save(path)
    return str(path)


def readings(groups: dict[Place, Tensor]) -> Readings:
    """Readings made up of rows per place."""
    places = [torch.full((len(x),), place) for place, x in groups.items()]
    return Readings(torch.cat(list(groups.values())), torch.cat(places))


def speaking(folder: Path) -> VLM:
    """The tiny model, except that it never says a special token other than the end of sequence."""
    vlm = load(folder, "cpu", torch.float32)
    head: Any = vlm.model.get_output_embeddings()
    with torch.no_grad():
        head.weight[[0, 1, 3]] = 0
    return vlm
