"""A guard as edits of a checkpoint: which tensors change, and how. No files, no models, no weights.

Interventions say what they ask of weights (guard/weight_edits.py); RESOLVE says, ask by ask, which tensors that is in a
family. Nothing here knows an intervention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..guard.base.errors import InputError
from ..guard.guard import Guard
from ..guard.weight_edits import AddBias, AddLowRank, MLPForm, ProjectWrites, ReplaceNeurons, WeightEdit
from .checkpoint.edits import (
    AddProduct,
    Edit,
    ProjectColumns,
    Projecting,
    ProjectRows,
    ProjectSlices,
    SetColumns,
    SetRows,
)
from .checkpoint.layout import Shape
from .families.table import MLP, Family, PostNorm, Writer

Placement = Literal["recycle", "widen"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
WIDEN_BY = 256
"""A widened MLP grows by a multiple of this, so that what was divisible by 256 stays so; the neurons not asked for are
zero.
"""

SMALLEST_GAIN = 1e-3
"""A post-norm whose gains span more than this (least to largest) is not folded: what is divided by them would explode.
"""

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
        """Returns layer (or "other") -> kind of edit -> number of tensors that have it, for every layer of the
        model.
        """
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
    """Returns the edits that make `family`'s checkpoint equal to the model with `guard`'s hooks attached.

    shapes: tensor's name on disk -> shape.  read: gives the gains of post-norms, where the family has any.  Raises
    InputError if an intervention does not fit the model or cannot be held by weights.
    """
    guard.check_fits(family.layers, family.width)
    site = Site(family, shapes, shapes, read)
    asked = [edit for intervention in guard.interventions for edit in intervention.edits(site.form_of)]
    grown = _grown(asked, site)
    site = replace(site, shapes={**shapes, **grown.grown}, replaced=_replaced(asked, site))
    edits: dict[str, list[Edit]] = {}
    for edit in asked:
        for name, change in RESOLVE[type(edit)](edit, site):
            edits.setdefault(name, []).append(change)
    untie = family.tied and family.embedding in edits
    changes = chain(*edits.values())
    oblique = any(isinstance(change, Projecting) and change.gain is not None for change in changes)
    return replace(grown, edits=edits, untie=untie, approximate=OBLIQUE if oblique else None)


def widened(family: Family, shapes: Mapping[str, Shape]) -> Fold:
    """Returns what would grow if a gate added neurons to the MLPs of `family`'s checkpoint; nothing is written into
    them.

    Raises InputError as `fold` does if not every layer has an MLP to be widened.
    """
    none, bias = torch.zeros(1, 1), torch.tensor([float(family.bias_flag is not None)])
    neuron = ReplaceNeurons(0, (), none, bias, none, none[0], none)
    return _grown([neuron], Site(family, shapes, shapes, None))


OBLIQUE = "norms after the sublayers rescale what a projection leaves; no weights equal it (oblique fold, leak-free)"


@dataclass(frozen=True)
class Site:
    """The checkpoint that edits are resolved on.

    before, shapes: tensor's name on disk -> its shape, as it is and as it will be.  read: gives gains of post-norms.
    replaced: layer -> which neurons of its MLP each ReplaceNeurons (by id) takes.
    """

    family: Family
    before: Mapping[str, Shape]
    shapes: Mapping[str, Shape]
    read: Read | None
    replaced: Mapping[int, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    def mlp(self, layer: int) -> MLP:
        """Returns the dense MLP of `layer`. InputError where it has none."""
        if layer not in self.family.mlps:
            raise InputError(f"{self.family.model_type}: layer {layer} has no dense MLP; a gate cannot be folded there")
        return self.family.mlps[layer]

    def form_of(self, layer: int) -> MLPForm:
        """Returns the form of the MLP of `layer`, as it is. InputError where it has none."""
        mlp = self.mlp(layer)
        biased = mlp.bias_of(mlp.gate) in self.before or self.family.bias_flag is not None
        return MLPForm(mlp.up is not None, biased, self.before[mlp.down][1])

    def writers(self, layer: int, sublayer: str) -> list[Writer]:
        return [writer for writer in self.family.writers if writer.layer == layer and writer.role == sublayer]


def _replaced(asked: Sequence[WeightEdit], site: Site) -> dict[int, dict[int, tuple[int, ...]]]:
    """Returns layer -> id of a ReplaceNeurons -> the places that it takes: its own, or new ones after all that was
    there.
    """
    taken: dict[int, dict[int, tuple[int, ...]]] = {}
    for edit in (edit for edit in asked if isinstance(edit, ReplaceNeurons)):
        others = taken.setdefault(edit.layer, {})
        first = site.form_of(edit.layer).neurons
        new = sum(1 for places in others.values() for place in places if place >= first)
        others[id(edit)] = edit.places or tuple(range(first + new, first + new + len(edit.gate)))
    return taken


def _grown(asked: Sequence[WeightEdit], site: Site) -> Fold:
    """Returns what grows, and by how much, if neurons are added and none recycled, and what gets biases;
    nothing else.
    """
    family, shapes = site.family, site.shapes
    added = [edit for edit in asked if isinstance(edit, ReplaceNeurons) and not edit.places]
    if added and len(family.mlps) != family.layers:
        raise InputError(
            f"{family.text_model_type}: not every layer has a dense MLP, so they cannot be widened; recycle"
        )
    per_layer = Counter[int]()
    for edit in added:
        per_layer[edit.layer] += len(edit.gate)
    more = WIDEN_BY * -(-max(per_layer.values(), default=0) // WIDEN_BY)
    lacking = any(edit.biased for edit in added) or any(_lacks_bias(e, site) for e in asked if isinstance(e, AddBias))
    flag = family.bias_flag if lacking else None
    if not more and not flag:
        return Fold({})
    grown: dict[str, Shape] = {}
    new: dict[str, str] = {}
    for mlp in family.mlps.values():
        neurons = shapes[mlp.down][1] + more
        rows = {**dict.fromkeys(mlp.reading, neurons), mlp.down: shapes[mlp.down][0]}
        if more:
            grown[mlp.down] = (rows[mlp.down], neurons)
            for name in mlp.reading:
                grown[name] = (neurons, shapes[name][1])
                if mlp.bias_of(name) in shapes:
                    grown[mlp.bias_of(name)] = (neurons,)
        if flag:
            bare = [name for name in rows if mlp.bias_of(name) not in shapes]
            grown |= {mlp.bias_of(name): (rows[name],) for name in bare}
            new |= {mlp.bias_of(name): name for name in bare}
    config: dict[str, Any] = {family.neurons_key: shapes[family.mlps[0].down][1] + more} if more else {}
    return Fold({}, grown=grown, new=new, text_config=config | ({flag: True} if flag else {}))


def _lacks_bias(edit: AddBias, site: Site) -> bool:
    """Tells whether the MLP that `edit` gives a bias has none yet."""
    mlp = site.family.mlps.get(edit.layer)
    return edit.sublayer == "mlp" and mlp is not None and mlp.bias_of(mlp.down) not in site.shapes


Changes = Iterator[tuple[str, Edit]]
"""(tensor's name on disk, edit of it), for every tensor that changes."""


def _project_writes(edit: ProjectWrites, site: Site) -> Changes:
    if edit.layer is None and site.family.obstacles:
        reason = site.family.obstacles[0]
        raise InputError(f"shared-projection: {site.family.model_type}: {reason}; use --scope sublayers")
    for writer in site.family.writers:
        if edit.layer is None:
            gain = _gain(writer.post_norm, site.read) if writer.post_norm else None
            yield writer.disk, _project(writer, site.shapes[writer.disk], edit, gain)
        elif writer.layer == edit.layer:
            yield writer.disk, _project(writer, site.shapes[writer.disk], edit, None)


def _project(writer: Writer, shape: Shape, edit: ProjectWrites, gain: Tensor | None) -> Edit:
    slices: dict[int, type[Projecting]] = {1: ProjectSlices} if len(shape) == 3 else {}
    kinds = slices | {len(shape) - 1: ProjectColumns} | {0: ProjectRows}
    if writer.axis not in kinds:
        raise InputError(f"{writer.disk}: cannot fold along axis {writer.axis} of {list(shape)}")
    return kinds[writer.axis](edit.basis, edit.strength, gain)


def _gain(norm: PostNorm, read: Read | None) -> Tensor:
    assert read is not None, "a fold under post-norms reads their gains"
    if norm.tensor is None:
        return torch.ones(1, dtype=torch.float64)
    gain = read(norm.tensor).double() + norm.offset
    if not gain.abs().min() > SMALLEST_GAIN * gain.abs().max():
        raise InputError(f"{norm.tensor}: gains next to zero; what is written before it cannot be folded")
    return gain


def _replace_neurons(edit: ReplaceNeurons, site: Site) -> Changes:
    mlp = site.mlp(edit.layer)
    if edit.biased and mlp.bias_of(mlp.gate) not in site.shapes:
        raise InputError(f"{mlp.gate}: has no bias, which this gate needs; use its bias-free form")
    count, places = site.shapes[mlp.down][1], site.replaced[edit.layer][id(edit)]
    if max(places) >= count:
        raise InputError(f"{mlp.down}: neuron {max(places)} is out of range; the MLP has {count}")
    yield mlp.gate, SetRows(dict(zip(places, edit.gate, strict=True)))
    yield mlp.down, SetColumns(dict(zip(places, edit.down, strict=True)))
    if mlp.bias_of(mlp.gate) in site.shapes:
        yield mlp.bias_of(mlp.gate), SetRows(dict(zip(places, edit.gate_bias, strict=True)))
    if mlp.up is not None:
        yield mlp.up, SetRows(dict(zip(places, edit.up, strict=True)))
        if mlp.bias_of(mlp.up) in site.shapes:
            yield mlp.bias_of(mlp.up), SetRows(dict(zip(places, edit.up_bias, strict=True)))


def _add_low_rank(edit: AddLowRank, site: Site) -> Changes:
    """Returns what reads neurons reads nothing of those that are replaced or added, whichever edit comes first."""
    weight = site.mlp(edit.layer).down if edit.sublayer == "mlp" else _output_weight(edit.layer, site)
    if site.before[weight] != (len(edit.left), edit.right.shape[1]):
        raise InputError(f"{weight}: is {list(site.before[weight])}, the gate reads {edit.right.shape[1]} neurons")
    right = F.pad(edit.right, (0, site.shapes[weight][1] - edit.right.shape[1]))
    if edit.sublayer == "mlp":
        right[:, sorted(chain(*site.replaced.get(edit.layer, {}).values()))] = 0
    yield weight, AddProduct(edit.left, right)


def _add_bias(edit: AddBias, site: Site) -> Changes:
    weight = site.mlp(edit.layer).down if edit.sublayer == "mlp" else _output_weight(edit.layer, site)
    bias = MLP.bias_of(weight)
    if len([writer for writer in site.writers(edit.layer, edit.sublayer) if writer.disk not in (weight, bias)]):
        raise InputError(f"{weight}: one of a mixture of experts, whose share varies; no bias of it acts everywhere")
    if bias not in site.shapes:
        raise InputError(f"{weight}: has no bias, and no config gives it one; export it with --format onnx")
    yield bias, AddProduct(edit.vector[:, None], torch.ones(1, dtype=edit.vector.dtype))


def _output_weight(layer: int, site: Site) -> str:
    """Returns the one weight by which the attention of `layer` writes. InputError where it is not one matrix [d,
    inputs].
    """
    found = [writer for writer in site.writers(layer, "attention") if len(site.shapes[writer.disk]) > 1]
    if len(found) != 1 or found[0].axis != 0 or len(site.shapes[found[0].disk]) != 2:
        raise InputError(f"{site.family.model_type}: the attention of layer {layer} writes by no single matrix")
    return found[0].disk


RESOLVE: dict[type[WeightEdit], Callable[[Any, Site], Changes]] = {
    ProjectWrites: _project_writes,
    ReplaceNeurons: _replace_neurons,
    AddLowRank: _add_low_rank,
    AddBias: _add_bias,
}
"""What is asked of weights -> the tensors of a family that change for it."""
