"""`vlm-guard`: VLM-Guard in weights, a sublayer projection followed by the best gate; `auto`: with or without it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ..fitting.material import Material
from ..interventions import Candidate, Gate, ResidualProjection, SublayerProjection
from .base import Preset, Round
from .gate import FIRST
from .layers import LAYER_SETS, parse_layers
from .projection import project, projection

STRENGTHS = (0.25, 0.5, 1.0)
RESIDUAL_ALPHA = 2.0
"""How strongly scope residual aligns. The published method aligns with another pass's states; with a position's own,
alpha = 1 gives back just what the projection took, and 2 doubles what points towards harm.
"""


def with_projection(material: Material, gate: Candidate | None) -> Iterable[Candidate]:
    """Returns `gate` after a sublayer projection, for every set of layers and strength; nothing without a gate."""
    if gate is None:
        return
    given, strength = material.settings.layers, material.settings.strength
    sets = {name: parse_layers(name, material.depth) for name in LAYER_SETS} if given is None else {"given": given}
    for name, layers in sets.items():
        for each in STRENGTHS if strength is None else (strength,):
            first = projection(material.directions, layers, "sublayers", each)
            yield Candidate(
                (first, *gate.interventions), {**gate.settings, "projection_layers": name, "strength": each}
            )


ROUNDS = (FIRST, Round("vlm-guard", "choosing a projection", with_projection))
PRESET = Preset(
    "vlm-guard",
    "projection and gate: VLM-Guard in weights",
    (SublayerProjection, Gate, ResidualProjection),
    ROUNDS,
    insists=True,
    outright={"residual": partial(project, scope="residual", alpha=RESIDUAL_ALPHA)},
)
AUTO = Preset("auto", "vlm-guard, unless the gate alone refuses more", (SublayerProjection, Gate), ROUNDS)
