"""A guard as edits of a checkpoint: which tensors change, and how. No files, no models, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..guard.base.errors import InputError
from ..guard.guard import Guard, Intervention
from ..guard.interventions.kinds import NEURONS, Gate, LinearGate, SharedProjection, SublayerProjection, TwoPass
from .checkpoint.edits import (
    AddLowRank,
    Edit,
    ProjectColumns,
    Projecting,
    ProjectRows,
    ProjectSlices,
    SetColumns,
    SetRows,
)
from .families.table import Family, PostNorm, Writer

Placement = Literal["recycle", "widen"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
WIDEN_BY = 256
"""A widened MLP grows by this many neurons, so that what was divisible by 256 stays so; all but the gate's are zero."""

SMALLEST_GAIN = 1e-3
"""A post-norm whose gains span more than this (least to largest) is not folded: what is divided by them would explode.
"""

Shape = tuple[int, ...]
Read = Callable[[str], Tensor]
"""Tensor's name on disk -> the tensor."""


@dataclass(frozen=True)
class Fold:
    """A guard as edits of a checkpoint.

    edits: tensor's name on disk -> its edits, in the guard's order.
    untie: whether the head must become a tensor of its own, a copy of the embedding as it was before its edits.
    grown: tensor -> the shape it gets, padded with zeros.
    new: tensor (zeros before its edits, its shape in `grown`) -> the tensor whose dtype and shard it takes.
    text_config: what changes in the text model's config.
    approximate: why the edits are not equal to the hooks, one line; None where they are.
    left_out: what the guard changes and these edits do not, as a line each; only of an adapter that holds a part of it.
    """

    edits: Mapping[str, Sequence[Edit]]
    untie: bool = False
    grown: Mapping[str, Shape] = field(default_factory=dict)
    new: Mapping[str, str] = field(default_factory=dict)
    text_config: Mapping[str, Any] = field(default_factory=dict)
    approximate: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def changed(self) -> set[str]:
        """Names of all tensors that are not copied byte by byte."""
        return {*self.edits, *self.grown}

    def per_layer(self, family: Family) -> dict[str, dict[str, int]]:
        """Layer (or "other") -> kind of edit -> number of tensors that have it, for every layer of the model."""
        of_layer = {writer.disk: str(writer.layer) for writer in family.writers if writer.layer is not None}
        for layer, mlp in family.mlps.items():
            weights = (*mlp.reading, mlp.down)
            of_layer |= dict.fromkeys((*weights, *map(mlp.bias_of, weights)), str(layer))
        counts: dict[str, dict[str, int]] = {str(layer): {} for layer in range(family.layers)}
        for name, edits in self.edits.items():
            table = counts.setdefault(of_layer.get(name, "other"), {})
            for kind in {"projection" if isinstance(edit, Projecting) else "gate" for edit in edits}:
                table[kind] = table.get(kind, 0) + 1
        return counts


def fold(guard: Guard, family: Family, shapes: Mapping[str, Shape], read: Read | None = None) -> Fold:
    """The edits that make `family`'s checkpoint equal to the model with `guard`'s hooks attached.

    shapes: tensor's name on disk -> shape.  read: gives the gains of post-norms, where the family has any.  Raises
    InputError if an intervention does not fit the model or cannot be held by weights.
    """
    guard.check_fits(family.layers, family.width)
    widened = _widen(guard, family, shapes)
    edits: dict[str, list[Edit]] = {}
    for each in guard.interventions:
        for name, edit in _edits(each, family, {**shapes, **widened.grown}, read):
            edits.setdefault(name, []).append(edit)
    untie = family.tied and family.embedding in edits
    oblique = any(isinstance(edit, Projecting) and edit.gain is not None for each in edits.values() for edit in each)
    return Fold(edits, untie, widened.grown, widened.new, widened.text_config, OBLIQUE if oblique else None)


OBLIQUE = "norms after the sublayers rescale what a projection leaves; no weights equal it (oblique fold, leak-free)"


def _widen(guard: Guard, family: Family, shapes: Mapping[str, Shape]) -> Fold:
    """What grows, and by how much, if a gate of `guard` recycles no neurons; nothing else."""
    gates = [each for each in guard.interventions if isinstance(each, Gate) and not each.recycled]
    if not gates:
        return Fold({})
    if len(family.mlps) != family.layers:
        raise InputError(
            f"{family.text_model_type}: not every layer has a dense MLP, so they cannot be widened; recycle"
        )
    neurons = shapes[family.mlps[0].down][1] + WIDEN_BY
    grown: dict[str, Shape] = {}
    new: dict[str, str] = {}
    config: dict[str, Any] = {family.neurons_key: neurons}
    for mlp in family.mlps.values():
        grown[mlp.down] = (shapes[mlp.down][0], neurons)
        for name in mlp.reading:
            grown[name] = (neurons, shapes[name][1])
            if mlp.bias_of(name) in shapes:
                grown[mlp.bias_of(name)] = (neurons,)
        if family.bias_flag and any(gate.unit is None for gate in gates):
            for name in (*mlp.reading, mlp.down):
                if mlp.bias_of(name) not in shapes:
                    grown[mlp.bias_of(name)] = (grown[name][0],)
                    new[mlp.bias_of(name)] = name
            config[family.bias_flag] = True
    return Fold({}, grown=grown, new=new, text_config=config)


def _edits(
    each: Intervention, family: Family, shapes: Mapping[str, Shape], read: Read | None
) -> Iterator[tuple[str, Edit]]:
    """(tensor's name on disk, edit) for every tensor that `each` changes."""
    if isinstance(each, SublayerProjection):
        for writer in family.writers:
            if writer.layer is not None and writer.layer in each.bases:
                yield writer.disk, _project(writer, shapes[writer.disk], each.bases[writer.layer], each.strength)
    elif isinstance(each, SharedProjection):
        if family.obstacles:
            raise InputError(f"{each.kind}: {family.model_type}: {family.obstacles[0]}; use --scope sublayers")
        for writer in family.writers:
            gain = _gain(writer.post_norm, read) if writer.post_norm else None
            yield writer.disk, _project(writer, shapes[writer.disk], each.basis, each.strength, gain)
    elif isinstance(each, Gate):
        yield from _gate_edits(each, family, shapes)
    elif isinstance(each, LinearGate):
        yield _linear_gate_edit(each, family, shapes)
    else:
        advice = (
            "only hooks run it" if isinstance(each, TwoPass) else "export it with --format onnx, or use another --scope"
        )
        raise InputError(f"{each.kind}: weights cannot hold it; {advice}")


def _project(writer: Writer, shape: Shape, basis: Tensor, strength: float, gain: Tensor | None = None) -> Edit:
    slices: dict[int, type[Projecting]] = {1: ProjectSlices} if len(shape) == 3 else {}
    kinds = slices | {len(shape) - 1: ProjectColumns} | {0: ProjectRows}
    if writer.axis not in kinds:
        raise InputError(f"{writer.disk}: cannot fold along axis {writer.axis} of {list(shape)}")
    return kinds[writer.axis](basis, strength, gain)


def _gain(norm: PostNorm, read: Read | None) -> Tensor:
    assert read is not None, "a fold under post-norms reads their gains"
    if norm.tensor is None:
        return torch.ones(1, dtype=torch.float64)
    gain = read(norm.tensor).double() + norm.offset
    if not gain.abs().min() > SMALLEST_GAIN * gain.abs().max():
        raise InputError(f"{norm.tensor}: gains next to zero; what is written before it cannot be folded")
    return gain


@dataclass(frozen=True)
class GateNeurons:
    """The two neurons of a gate, opening at t0 and closing at t1: [2, d] and [2], rows in that order.

    gate, gate_bias: beta (u - t k) and 0, or beta u and -beta t where the MLP has biases.  up, up_bias: k / beta and 0,
    or 0 and 1 / beta.  down: [2, d], what each writes, +-c / (t1 - t0) (times 1 / beta in a plain MLP: no up).
    """

    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor

    @classmethod
    def of(cls, gate: Gate, gated: bool) -> GateNeurons:
        t = torch.tensor([gate.t0, gate.t1], dtype=torch.float64)
        u = gate.detector.double().expand(NEURONS, -1)
        zero, sign = torch.zeros_like(u), torch.tensor([[1.0], [-1.0]])
        down = sign * gate.column.double() / (gate.t1 - gate.t0) / (1.0 if gated else gate.beta)
        if gate.unit is None:
            return cls(gate.beta * u, -gate.beta * t, zero, torch.full_like(t, 1 / gate.beta), down)
        k = gate.unit.double().expand(NEURONS, -1)
        return cls(gate.beta * (u - t[:, None] * k), torch.zeros(NEURONS), k / gate.beta, torch.zeros(NEURONS), down)


def _gate_edits(gate: Gate, family: Family, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Edit]]:
    if gate.layer not in family.mlps:
        raise InputError(f"{family.model_type}: layer {gate.layer} has no dense MLP; a gate cannot be folded there")
    mlp = family.mlps[gate.layer]
    if gate.unit is None and mlp.bias_of(mlp.gate) not in shapes:
        raise InputError(f"{mlp.gate}: has no bias, which this gate needs; use its bias-free form")
    count = shapes[mlp.down][1]
    places = gate.recycled or tuple(range(count - WIDEN_BY, count - WIDEN_BY + NEURONS))
    if max(places) >= count:
        raise InputError(f"{mlp.down}: neuron {max(places)} is out of range; the MLP has {count}")
    neurons = GateNeurons.of(gate, mlp.up is not None)
    yield mlp.gate, SetRows(dict(zip(places, neurons.gate, strict=True)))
    yield mlp.down, SetColumns(dict(zip(places, neurons.down, strict=True)))
    if mlp.bias_of(mlp.gate) in shapes:
        yield mlp.bias_of(mlp.gate), SetRows(dict(zip(places, neurons.gate_bias, strict=True)))
    if mlp.up is not None:
        yield mlp.up, SetRows(dict(zip(places, neurons.up, strict=True)))
        if mlp.bias_of(mlp.up) in shapes:
            yield mlp.bias_of(mlp.up), SetRows(dict(zip(places, neurons.up_bias, strict=True)))


def _linear_gate_edit(gate: LinearGate, family: Family, shapes: Mapping[str, Shape]) -> tuple[str, Edit]:
    if gate.layer not in family.mlps:
        raise InputError(f"{family.model_type}: layer {gate.layer} has no dense MLP; a gate cannot be folded there")
    down = family.mlps[gate.layer].down
    if shapes[down] != (gate.width, len(gate.readout)):
        raise InputError(f"{down}: is {list(shapes[down])}, the gate reads {len(gate.readout)} neurons")
    return down, AddLowRank(gate.column[:, None], gate.readout[None])
