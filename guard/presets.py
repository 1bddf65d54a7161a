"""How a preset's name, a choice of layers, a rank and a strength become a guard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .directions import Directions
from .errors import InputError
from .guard import Guard, SharedProjection, SublayerProjection

Scope = Literal["sublayers", "shared"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LAYER_SETS = {"last-quarter": 4, "last-half": 2, "all": 1}
"""Name -> the share of the layers, from the top, as a divisor."""

DEFAULT_LAYERS = "last-quarter"


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
    directions: Directions, scope: Scope, strength: float = 1.0, provenance: Mapping[str, Any] | None = None
) -> Guard:
    """The projection half of VLM-Guard: own V_l on each extracted layer's sublayers, or one V for the whole stream.

    On its own this is refusal ablation and can make a model less safe: measure before calling it a guard.
    """
    if scope == "shared":
        return Guard((SharedProjection(directions.bases[best_layer(directions)], strength),), provenance or {})
    return Guard((SublayerProjection(directions.bases, strength),), provenance or {})
