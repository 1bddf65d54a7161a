"""`linear`: a gate without a threshold, as a rank-1 update of down_proj that a LoRA adapter holds."""

from __future__ import annotations

from collections.abc import Iterable

from ..fitting.linear_probe import fit_readout
from ..fitting.material import Material
from ..interventions import Candidate, LinearGate
from .base import Preset, Round

WEIGHTS = (1.0, 4.0, 16.0)
"""How much staying shut elsewhere counts against opening where it should."""

GAINS = (0.25, 0.5, 1.0)
"""Smaller ones than a gate's: what a linear gate lets through elsewhere grows with them."""


def linear_gates(material: Material, _before: Candidate | None = None) -> Iterable[Candidate]:
    """One linear gate for every layer, weight, and gain."""
    for layer, found in material.examples("fit", material.tried, neurons=True).items():
        v, gap = material.directions.bases[layer][0], material.directions.gap[layer]
        for weight in WEIGHTS:
            readout = fit_readout(found.positives, found.other, weight)
            for gain in GAINS:
                gate = LinearGate(layer, readout, gain * gap * v)
                yield Candidate((gate,), {"layer": layer, "weight": weight, "gain": gain})


PRESET = Preset(
    "linear",
    "a gate without a threshold, which a LoRA adapter holds",
    (LinearGate,),
    (Round("linear", "choosing a linear gate", linear_gates),),
)
