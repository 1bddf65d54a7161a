"""`gate`: two neurons of one MLP that recognise the end of a harmful request and write the refusal direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..fitting.directions import auc
from ..fitting.last_tokens import Group, LastTokens
from ..fitting.linear_probe import ALWAYS, Detector, LinearProbe, fit_constant, fit_probe, prompt_threshold
from ..fitting.material import Material
from ..fitting.transcripts import Place, Readings
from ..interventions import Candidate, Gate
from ..interventions.gate import NEURONS
from .base import Preset, Round

SHARES: Mapping[Group, float] = {"harmful": 0.5, "harmless": 0.1, "benign": 0.2, "near": 0.2}
"""What each group of prompts weighs in the detector's fit, whatever their number. Matched twins alone would leave
natural prompts unseen, and weighing them more costs more recall than it saves.
"""

ELSEWHERE = 0.5
"""What all positions that are no prompt's last weigh, each kind of place alike, of the whole."""

MISSED = 2
"""How many times the rate of false openings may be missed of harmful prompts, where almost all are told apart."""

POSITIONS = 4096
"""Of each kind of place that the detector is fitted to: more did not change it, and cost."""

RATES = (0.0025, 0.005)
"""Shares of benign prompts at which a gate may newly open. The verdict bounds what is lost from above, so that about
half of what it allows may be spent: 2 % of near misses.
"""

OFTENER: Mapping[Group, float] = {"benign": 1, "near": 4, "harmless": 20}
"""How many times as often it may in each group. Twins of harmful prompts are the hardest near misses there are."""

LAYERS = 3
"""So many layers are tried: those that recognise most harmful prompts."""

GAINS: Mapping[str, tuple[float, ...]] = {"v1": (0.5, 1.0, 3.0), "refused": (1.0, 3.0)}
"""Column -> multiples of it that are tried. v1: gap * v_1.  refused: the mean difference of the stream between harmful
prompts that the model refuses and those that it complies with (Arditi et al. 2024), made as long as gap.
"""

ENOUGH = 8
"""Fewer harmful prompts refused, or complied with, make no direction of refusal and no rate."""

REPORTED = (0.005, 0.01, 0.03)
"""Rates of false openings at which recall is reported."""


def gates(material: Material, _before: Candidate | None = None) -> Iterable[Candidate]:
    """Gates in the layers that recognise most, for every rate of false openings, column, and gain."""
    rates = RATES if material.settings.rate is None else (material.settings.rate,)
    last = material.last_tokens
    layers = best_layers(material, max(rates))
    examples = material.examples("fit", layers)
    elsewhere = {layer: found.other.but(Place.LAST).head(POSITIONS) for layer, found in examples.items()}
    for layer in layers:
        probe = fitted(material, layer, elsewhere[layer])
        material.notes.setdefault("detector", {})[str(layer)] = figures(probe, last)
        for rate in rates:
            detector = detect(probe, last, rate)
            for name, column in columns(material, layer).items():
                for gain in GAINS[name]:
                    settings = {"layer": layer, "false_positive_rate": rate, "column": name, "gain": gain}
                    yield Candidate((_gate(material, layer, detector, gain * column),), settings)


def _gate(material: Material, layer: int, detector: Detector, column: Tensor) -> Gate:
    places, beta = material.places(layer, NEURONS), material.settings.beta
    return Gate(layer, detector.u, column, detector.t0, detector.t1, detector.unit, places, beta)


def best_layers(material: Material, rate: float) -> list[int]:
    """Returns the LAYERS layers, ascending, whose probes recognise most harmful prompts of wordings not seen."""
    last = material.last_tokens
    probes = {layer: fitted(material, layer) for layer in material.upper}
    found = {layer: recall(probe, last, threshold(probe, last, rate)) for layer, probe in probes.items()}
    material.notes["recall"] = {str(layer): share for layer, share in found.items()}
    return sorted(sorted(found, key=lambda layer: found[layer])[-LAYERS:])


def fitted(material: Material, layer: int, elsewhere: Readings | None = None) -> LinearProbe:
    """Returns the probe of `layer`, fitted to last tokens and, where given, to readings at other positions."""
    last = material.last_tokens
    x, harmful, folds = last.x[layer], last.rows("harmful"), last.folds
    unit = None if material.biases else fit_constant(x, elsewhere)
    weight = _shared({group: (last.rows(group), share) for group, share in SHARES.items()})
    if elsewhere is not None:
        places = {place.name: (elsewhere.places == place, 1.0) for place in Place}
        x, harmful = torch.cat([x, elsewhere.x]), torch.cat([harmful, torch.zeros(len(elsewhere.x), dtype=torch.bool)])
        weight = torch.cat([(1 - ELSEWHERE) * weight, ELSEWHERE * _shared(places)])
        folds = torch.cat([folds, torch.full((len(elsewhere.x),), ALWAYS)])
    return fit_probe(x, harmful, weight, folds, unit)


def _shared(groups: Mapping[str, tuple[Tensor, float]]) -> Tensor:
    """Weights that sum to 1, [n]: each group (its rows, [n] bool, and its share) alike in its rows."""
    weight = torch.stack([share * rows.float() / max(1, int(rows.sum())) for rows, share in groups.values()]).sum(0)
    return weight / weight.sum()


def detect(probe: LinearProbe, last: LastTokens, rate: float) -> Detector:
    """Returns the detector that newly opens at `rate` of benign prompts, OFTENER times that of others; where it could
    open more rarely and still miss no more than MISSED times `rate` of harmful prompts, it does.
    """
    harmful = _scores(probe, last)[last.rows("harmful")]
    return probe.detector(max(threshold(probe, last, rate), float(harmful.quantile(MISSED * rate))), harmful)


def threshold(probe: LinearProbe, last: LastTokens, rate: float) -> float:
    """Returns the lowest score at which a gate opens newly on at most `rate` of benign prompts, and OFTENER times that
    of others: prompts that the model refuses anyway are none.
    """
    scores = _scores(probe, last).masked_fill(last.refused, float("-inf"))
    return prompt_threshold(scores, {group: (last.rows(group), rate * often) for group, often in OFTENER.items()})


def _scores(probe: LinearProbe, last: LastTokens) -> Tensor:
    """Scores of prompts by fits that have not seen them; what follows them are other positions."""
    return probe.held_out[: len(last.asked)]


def recall(probe: LinearProbe, last: LastTokens, t0: float) -> float:
    """Returns the share of harmful prompts that open a gate at `t0`, of those that the model complies with."""
    harmful = last.rows("harmful")
    complied = harmful & ~last.refused
    counted = complied if int(complied.sum()) >= ENOUGH else harmful
    return float((_scores(probe, last)[counted] > t0).double().mean())


def columns(material: Material, layer: int) -> dict[str, Tensor]:
    """Returns what a gate may write, each [d] and as long as gap: a name of GAINS -> column."""
    v, gap = material.directions.bases[layer][0], material.directions.gap[layer]
    found = {"v1": gap * v}
    last = material.last_tokens
    harmful = last.rows("harmful")
    refused, complied = (last.h[layer][harmful & each] for each in (last.refused, ~last.refused))
    if min(len(refused), len(complied)) >= ENOUGH:
        difference = refused.mean(0) - complied.mean(0)
        found["refused"] = abs(gap) * difference / difference.norm()
    return found


def figures(probe: LinearProbe, last: LastTokens) -> dict[str, Any]:
    """Returns, as JSON, how well prompts of wordings not seen are told apart: AUC against twins by image kind, and the
    recall of harmful prompts by group, rate of openings in it, and image kind.
    """
    scores, harmful = _scores(probe, last), last.rows("harmful")
    kinds = sorted({each.kind for each in last.asked if each.group == "harmful" and each.kind is not None})
    found: dict[str, Any] = {
        "l2": probe.l2,
        "auc": {k: auc(scores[last.rows("harmful", k)], scores[last.rows("harmless", k)]) for k in kinds},
        "recall": {},
    }
    for group in OFTENER:
        if not (rows := last.rows(group)).any():
            continue
        for rate in REPORTED:
            t0 = prompt_threshold(scores, {group: (rows, rate)})
            opens = {kind: float((scores[last.rows("harmful", kind)] > t0).double().mean()) for kind in kinds}
            found["recall"].setdefault(group, {})[f"{rate:g}"] = opens
    found["prompts"] = {"harmful": int(harmful.sum()), **{group: int(last.rows(group).sum()) for group in OFTENER}}
    return found


FIRST = Round("gate", "choosing a gate", gates)
PRESET = Preset("gate", "the gate alone", (Gate,), (FIRST,))
