"""`projection`: VLM-Guard's projection alone. This is refusal ablation and can make a model less safe."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..fitting.directions import Directions, extract
from ..fitting.material import Material
from ..interventions import Candidate, Intervention, ResidualProjection, SharedProjection, SublayerProjection
from .base import Preset
from .layers import DEFAULT_LAYERS, SCOPES, Scope, parse_layers

MAX_ANCHORS = 100
"""Pairs that a projection on its own is extracted from (the paper's N)."""


def best_layer(directions: Directions) -> int:
    """Returns the layer whose direction separates text best (cross-fitted AUC; the uppermost of equals)."""
    return max(directions.bases, key=lambda layer: (round(directions.auc["text"][layer], 3), layer))


def projection(
    directions: Directions, layers: Sequence[int], scope: Scope, strength: float, alpha: float = 0.0
) -> Intervention:
    """Returns the projection half of VLM-Guard: own V_l on the sublayers of `layers`, or on the residual stream after
    them (there with its aligning half as well, `alpha`), or the best of them for the whole stream.
    """
    chosen = directions.only(layers)
    if scope == "shared":
        return SharedProjection(chosen.bases[best_layer(chosen)], strength)
    if scope == "residual":
        return ResidualProjection(chosen.bases, strength, alpha)
    return SublayerProjection(chosen.bases, strength)


def project(material: Material, scope: Scope, alpha: float = 0.0) -> tuple[Candidate, Directions]:
    """Returns the projection that the settings ask for (default: the last quarter, in full), and the directions it is
    of.
    """
    settings = material.settings
    layers = settings.layers or parse_layers(DEFAULT_LAYERS, material.depth)
    directions = extract(material.vlm, material.anchors.head(MAX_ANCHORS), layers, settings.rank)
    strength = 1.0 if settings.strength is None else settings.strength
    return Candidate((projection(directions, layers, scope, strength, alpha),)), directions


PRESET = Preset(
    "projection",
    "the projection alone, which ablates refusals: measured, and mostly refused",
    (SublayerProjection, SharedProjection, ResidualProjection),
    outright={scope: partial(project, scope=scope) for scope in SCOPES},
)
