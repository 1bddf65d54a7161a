"""Where a guard acts: sets of layers by name or number, and the scopes of a projection."""

from __future__ import annotations

import re
from typing import Literal, get_args

from ..base.errors import InputError

Scope = Literal["sublayers", "shared", "residual"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
LAYER_SETS = {"last-quarter": 4, "last-half": 2, "all": 1}
"""Name -> the share of the layers, from the top, as a divisor."""

DEFAULT_LAYERS = "last-quarter"


def parse_layers(text: str, count: int) -> list[int]:
    """Returns the layers that `text` names in a model of `count`: last-quarter, last-half, all, or numbers like
    3,5,20-31.

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
