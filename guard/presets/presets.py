"""How a preset's name and its settings become guards, or lists of candidates to choose among."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..base.errors import InputError
from ..fitting.calibration import Examples
from ..fitting.directions import Directions
from ..fitting.linear_probe import Detector, fit_direction, fit_readout, fit_unit, least_used, thresholds
from ..guard import Intervention
from ..interventions.kinds import NEURONS, Gate, LinearGate, ResidualProjection, SharedProjection, SublayerProjection

Scope = Literal["sublayers", "shared", "residual"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LAYER_SETS = {"last-quarter": 4, "last-half": 2, "all": 1}
"""Name -> the share of the layers, from the top, as a divisor."""

DEFAULT_LAYERS = "last-quarter"
STRENGTHS = (0.25, 0.5, 1.0)
FALSE_POSITIVE_RATES = (1e-3, 3e-3)
GAINS = (0.5, 1.0, 2.0)
"""a: a gate writes a * gap * v_1 when it is open, gap being how far apart harmful and harmless lie along v_1."""

WEIGHTS = (1.0, 4.0, 16.0)
"""Of a linear gate: how much staying shut elsewhere counts against opening where it should."""

LINEAR_GAINS = (0.25, 0.5, 1.0)
"""Smaller ones than a gate's: what a linear gate lets through elsewhere grows with them."""

GATE_LAYERS = 4
"""At most so many layers are tried for a gate, evenly spaced over the upper half."""


@dataclass(frozen=True)
class Candidate:
    """Interventions to choose among, with the settings that tell them apart (JSON)."""

    interventions: tuple[Intervention, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def gate_layers(count: int) -> list[int]:
    """The layers tried for a gate in a model of `count`."""
    half = list(range(count // 2, count))
    return (
        half
        if len(half) <= GATE_LAYERS
        else [half[i * (len(half) - 1) // (GATE_LAYERS - 1)] for i in range(GATE_LAYERS)]
    )


def parse_layers(text: str, count: int) -> list[int]:
    """The layers that `text` names in a model of `count`: last-quarter, last-half, all, or numbers like 3,5,20-31.

    0-indexed, ranges inclusive.  Raises InputError for anything else and for layers that do not exist.
    """
    if text in LAYER_SETS:
        return list(range(count - max(1, count // LAYER_SETS[text]), count))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if not match:
            raise InputError(f"--layers {text!r}: expected {', '.join(LAYER_SETS)}, or numbers like 3,5,20-31")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise InputError(f"--layers {text!r}: layer {part.strip()} is out of range; layers are 0 to {count - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def best_layer(directions: Directions) -> int:
    """The layer whose direction separates text best (cross-fitted AUC; the uppermost of equals)."""
    return max(directions.bases, key=lambda layer: (round(directions.auc["text"][layer], 3), layer))


def projection(
    directions: Directions, layers: Sequence[int], scope: Scope, strength: float, alpha: float = 0.0
) -> Intervention:
    """The projection half of VLM-Guard: own V_l on the sublayers of `layers`, or on the residual stream after them
    (there with its aligning half as well, `alpha`), or the best of them for the whole stream.

    On its own this is refusal ablation and can make a model less safe: measure before calling it a guard.
    """
    chosen = directions.only(layers)
    if scope == "shared":
        return SharedProjection(chosen.bases[best_layer(chosen)], strength)
    if scope == "residual":
        return ResidualProjection(chosen.bases, strength, alpha)
    return SublayerProjection(chosen.bases, strength)


@dataclass(frozen=True)
class Material:
    """What gates are made of, layer by layer: examples to fit and set thresholds on, and how much each neuron writes.

    importance: layer -> E|a_j| |down[:, j]|, [neurons].  biases: whether the guarded MLPs will have biases.
    recycle: whether the gate takes the place of the least used neurons (else the MLP is widened).
    """

    fit: Mapping[int, Examples]
    threshold: Mapping[int, Examples]
    importance: Mapping[int, Tensor]
    directions: Directions
    biases: bool
    recycle: bool
    beta: float


def gates(material: Material, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> Iterator[Candidate]:
    """One gate for every layer, false-positive rate of t0, and gain."""
    for layer, fit in material.fit.items():
        set_on = material.threshold[layer]
        u = fit_direction(fit.positives, fit.other.x)
        v, gap = material.directions.bases[layer][0], material.directions.gap[layer]
        for rate in rates:
            detector = detect(u, fit, set_on, rate, material.biases)
            for gain in GAINS:
                gate = Gate(
                    layer,
                    detector.u,
                    gain * gap * v,
                    detector.t0,
                    detector.t1,
                    detector.unit,
                    least_used(material.importance[layer], NEURONS) if material.recycle else (),
                    material.beta,
                )
                yield Candidate((gate,), {"layer": layer, "false_positive_rate": rate, "gain": gain})


def linear_gates(fit: Mapping[int, Examples], directions: Directions) -> Iterator[Candidate]:
    """One linear gate for every layer, weight, and gain.  fit: layer -> examples of the neurons of its MLP."""
    for layer, found in fit.items():
        v, gap = directions.bases[layer][0], directions.gap[layer]
        for weight in WEIGHTS:
            readout = fit_readout(found.positives, found.other, weight)
            for gain in LINEAR_GAINS:
                gate = LinearGate(layer, readout, gain * gap * v)
                yield Candidate((gate,), {"layer": layer, "weight": weight, "gain": gain})


def detect(u: Tensor, fit: Examples, set_on: Examples, rate: float, biases: bool) -> Detector:
    """The detector along u with its thresholds, and with its unit where the MLP has no biases."""
    t0, t1 = thresholds(u, set_on.positives, set_on.other.x, rate)
    if biases:
        return Detector(u, t0, t1)
    positives = torch.cat([fit.positives, set_on.positives])
    return Detector(u, t0, t1, fit_unit(u, t0, t1, positives, type(fit.other).join([fit.other, set_on.other])))


def with_projection(
    gate: Candidate, directions: Directions, layer_sets: Mapping[str, Sequence[int]], strengths: Sequence[float]
) -> Iterator[Candidate]:
    """VLM-Guard in weights: `gate` after a sublayer projection, for every set of layers and strength."""
    for name, layers in layer_sets.items():
        for strength in strengths:
            first = projection(directions, layers, "sublayers", strength)
            settings = {**gate.settings, "projection_layers": name, "strength": strength}
            yield Candidate((first, *gate.interventions), settings)
