"""`gate`: two neurons of one MLP that recognise the end of a harmful request and write the refusal direction."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..fitting.calibration import Examples
from ..fitting.linear_probe import Detector, fit_direction, fit_unit, thresholds
from ..fitting.material import Material
from ..interventions import Candidate, Gate
from ..interventions.gate import NEURONS
from .base import Preset, Round

FALSE_POSITIVE_RATES = (1e-3, 3e-3)
GAINS = (0.5, 1.0, 2.0)
"""a: a gate writes a * gap * v_1 when it is open, gap being how far apart harmful and harmless lie along v_1."""


def gates(material: Material, _before: Candidate | None = None) -> Iterable[Candidate]:
    """One gate for every layer, false-positive rate of t0, and gain."""
    rate = material.settings.rate
    for layer, fit in material.examples("fit").items():
        set_on = material.examples("threshold")[layer]
        u = fit_direction(fit.positives, fit.other.x)
        v, gap = material.directions.bases[layer][0], material.directions.gap[layer]
        for false_positive_rate in FALSE_POSITIVE_RATES if rate is None else (rate,):
            detector = detect(u, fit, set_on, false_positive_rate, material.biases)
            for gain in GAINS:
                gate = Gate(
                    layer,
                    detector.u,
                    gain * gap * v,
                    detector.t0,
                    detector.t1,
                    detector.unit,
                    material.places(layer, NEURONS),
                    material.settings.beta,
                )
                yield Candidate((gate,), {"layer": layer, "false_positive_rate": false_positive_rate, "gain": gain})


def detect(u: Tensor, fit: Examples, set_on: Examples, rate: float, biases: bool) -> Detector:
    """Returns the detector along u with its thresholds, and with its unit where the MLP has no biases."""
    t0, t1 = thresholds(u, set_on.positives, set_on.other.x, rate)
    if biases:
        return Detector(u, t0, t1)
    positives = torch.cat([fit.positives, set_on.positives])
    return Detector(u, t0, t1, fit_unit(u, t0, t1, positives, type(fit.other).join([fit.other, set_on.other])))


FIRST = Round("gate", "choosing a gate", gates)
PRESET = Preset("gate", "the gate alone", (Gate,), (FIRST,))
