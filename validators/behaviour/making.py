"""A guard from a model: directions, candidates, and the one that held-out anchors choose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...export.checkpoint.headers import Checkpoint
from ...export.families.table import Family, family_of
from ...export.fold import Placement
from ...export.publish.card import Source
from ...guard.base.errors import InputError
from ...guard.base.untrusted import is_file
from ...guard.fitting.calibration import BUILT_IN_BENIGN, Part, Role, deal, examples, load_benign
from ...guard.fitting.directions import Directions, extract
from ...guard.fitting.transcripts import Usage
from ...guard.guard import Guard, Intervention
from ...guard.interventions.kinds import Gate, LinearGate, TwoPass
from ...guard.model.roles import mlp_parts
from ...guard.model.vlm import VLM, load, threads_for
from ...guard.presets.presets import (
    DEFAULT_LAYERS,
    FALSE_POSITIVE_RATES,
    LAYER_SETS,
    STRENGTHS,
    Material,
    Scope,
    gate_layers,
    gates,
    linear_gates,
    parse_layers,
    projection,
    with_projection,
)
from ...guard.prompts.prompts import BUILT_IN_ANCHORS, beside, load_anchors
from .evaluation_prompts import refusal_text
from .judge import PhraseJudge
from .selection import Bench, best, choose, sample_scores, scrutinise, scrutinise_linear

PRESETS = ("auto", "vlm-guard", "gate", "linear", "projection")
GATED = ("auto", "vlm-guard", "gate")
DEFAULT_PRESET = "auto"
RESIDUAL_ALPHA = {"projection": 0.0, "vlm-guard": 2.0}
"""How strongly a preset aligns, in scope residual. The published method aligns with another pass's states; with a
position's own, alpha = 1 gives back just what the projection took, and 2 doubles what points towards harm."""

MAX_ANCHORS = 100
"""Pairs that a projection on its own is extracted from (the paper's N)."""


@dataclass(frozen=True)
class GuardOptions:
    """Which guard: a guard file, or a preset with where it acts, how strongly, and from what it is made.

    guard: a file, or one of PRESETS.  scope, rank: of the projection.  layers, strength: of the projection; None lets
    validation choose (the preset projection takes the last quarter in full).  false_positive_rate: share of harmless
    positions that reach t0; None lets validation choose.  placement: recycle overwrites the least used neurons, widen
    adds some.  beta: steepness of the gate's corners.  family: a file that says what writes to the residual stream in a
    family that has no row.
    """

    guard: str = DEFAULT_PRESET
    scope: Scope = "sublayers"
    layers: str | None = None
    rank: int = 1
    strength: float | None = None
    false_positive_rate: float | None = None
    placement: Placement = "recycle"
    beta: float = 256.0
    anchors: Path | None = None
    benign: Path | None = None
    family: Path | None = None


def guard_of(folder: Path, name: str, options: GuardOptions) -> Guard:
    """The guard that `options` describe, read from a file or made from the model in `folder`, called `name`.

    Raises InputError for a model or prompts that cannot be used, layers out of range, or a rank above the anchors, and
    Refused if no candidate is within the limits or the detector cannot tell harmful prompts apart.
    """
    if options.guard.endswith(".safetensors") or is_file(options.guard):
        return Guard.load(Path(options.guard))
    if options.guard not in PRESETS:
        raise InputError(f"{options.guard}: neither a guard file nor a preset ({', '.join(PRESETS)})")
    if options.scope == "residual" and options.guard not in RESIDUAL_ALPHA:
        raise InputError(f"--scope residual: has no {options.guard}; use --guard {' or '.join(RESIDUAL_ALPHA)}")
    with threads_for(folder):
        return _made(folder, name, options)


def _made(folder: Path, name: str, options: GuardOptions) -> Guard:
    anchors = load_anchors(options.anchors or beside(folder, "anchors.jsonl") or BUILT_IN_ANCHORS)
    if options.rank > min(len(anchors), MAX_ANCHORS):
        raise InputError(f"--rank {options.rank}: more than the {min(len(anchors), MAX_ANCHORS)} anchor pairs")
    family = family_of(Checkpoint.open(folder), options.family)
    layers = parse_layers(options.layers, family.layers) if options.layers else None
    vlm = load(folder)
    provenance = {
        "guardfold": __version__,
        "model": name,
        "revision": Source(name, folder).revision,
        "anchors": {"sha256": anchors.hash, "pairs": len(anchors)},
    }
    if options.guard == "projection" or options.scope == "residual":
        chosen = layers or parse_layers(DEFAULT_LAYERS, family.layers)
        directions = extract(vlm, anchors.head(MAX_ANCHORS), chosen, options.rank)
        strength = 1.0 if options.strength is None else options.strength
        alpha = RESIDUAL_ALPHA[options.guard]
        interventions: tuple[Intervention, ...] = (projection(directions, chosen, options.scope, strength, alpha),)
        found: dict[str, Any] = {"directions": directions.figures()}
    else:
        benign = load_benign(options.benign or beside(folder, "benign.jsonl") or BUILT_IN_BENIGN)
        parts = deal(anchors, benign)
        if options.guard == "linear":
            interventions, directions, found = _linear(vlm, family, parts)
        else:
            interventions, directions, found = _gated(vlm, family, parts, layers, options)
    late = [layer for layer in parse_layers(DEFAULT_LAYERS, family.layers) if layer in directions.bases]
    reference = TwoPass(directions.only(late).bases) if late else None
    return Guard(interventions, json.loads(json.dumps({**provenance, **found})), reference)


def _gated(
    vlm: VLM, family: Family, parts: dict[Role, Part], layers: list[int] | None, options: GuardOptions
) -> tuple[tuple[Intervention, ...], Directions, dict[str, Any]]:
    """The best gate, or projection with gate, on the select part; the directions; and all that was found, as JSON."""
    if options.scope == "shared":
        raise InputError("--scope shared: a shared projection would erase what a gate writes; use --guard projection")
    tried = [layer for layer in gate_layers(family.layers) if layer in family.mlps]
    if not tried:
        raise InputError(f"{family.model_type}: no upper layer has a dense MLP; a gate cannot be folded there")
    directions = extract(vlm, parts["fit"].anchors, range(family.layers), options.rank)
    material = _material(vlm, family, parts, directions, tried, options)
    rates = FALSE_POSITIVE_RATES if options.false_positive_rate is None else (options.false_positive_rate,)
    bench = Bench(vlm, parts["select"], PhraseJudge(refusal_text(vlm.folder)))
    trials = bench.try_all(list(gates(material, rates)), "choosing a gate")
    gate, full, more = best(trials, bench.original), None, []
    if gate and options.guard != "gate":
        sets = {name: parse_layers(name, family.layers) for name in LAYER_SETS} if layers is None else {"given": layers}
        strengths = STRENGTHS if options.strength is None else (options.strength,)
        candidates = list(with_projection(gate.candidate, directions, sets, strengths))
        more = bench.try_all(candidates, "choosing a projection")
        full = best(more, bench.original)
    chosen, why = choose(options.guard, gate, full)
    final = next(each for each in chosen.candidate.interventions if isinstance(each, Gate))
    held_out = examples(vlm, parts["test"], [final.layer], "test")[final.layer]
    found = {
        "directions": directions.figures(),
        "selection": {
            "chosen": chosen.row(),
            "preset": "gate" if chosen is gate else "vlm-guard",
            "why": why,
            "original": asdict(bench.original),
            "candidates": [trial.row() for trial in (*trials, *more)],
            "parts": {role: len(part.harmful) for role, part in parts.items()},
        },
        "held_out": scrutinise(vlm, final, held_out),
        "scores": sample_scores(final, held_out),
    }
    return chosen.candidate.interventions, directions, found


def _linear(
    vlm: VLM, family: Family, parts: dict[Role, Part]
) -> tuple[tuple[Intervention, ...], Directions, dict[str, Any]]:
    """The best linear gate on the select part; the directions; and all that was found, as JSON."""
    tried = [layer for layer in gate_layers(family.layers) if layer in family.mlps]
    if not tried:
        raise InputError(f"{family.model_type}: no upper layer has a dense MLP; a gate cannot be folded there")
    directions = extract(vlm, parts["fit"].anchors, range(family.layers), 1)
    fit = examples(vlm, parts["fit"], tried, "fit", neurons=True)
    bench = Bench(vlm, parts["select"], PhraseJudge(refusal_text(vlm.folder)))
    trials = bench.try_all(list(linear_gates(fit, directions)), "choosing a linear gate")
    chosen, why = choose("gate", best(trials, bench.original), None)
    (final,) = (each for each in chosen.candidate.interventions if isinstance(each, LinearGate))
    held_out = examples(vlm, parts["test"], [final.layer], "test", neurons=True)[final.layer]
    selection = {
        "chosen": chosen.row(),
        "preset": "linear",
        "why": why,
        "original": asdict(bench.original),
        "candidates": [trial.row() for trial in trials],
        "parts": {role: len(part.harmful) for role, part in parts.items()},
    }
    found = {"directions": directions.figures(), "selection": selection}
    return chosen.candidate.interventions, directions, {**found, "held_out": scrutinise_linear(final, held_out)}


def _material(
    vlm: VLM,
    family: Family,
    parts: dict[Role, Part],
    directions: Directions,
    layers: list[int],
    options: GuardOptions,
) -> Material:
    usage: dict[int, Usage] = {}
    fit = examples(vlm, parts["fit"], layers, "fit", usage)
    downs = {layer: mlp_parts(vlm.layers[layer]).down.weight for layer in layers}
    biased = mlp_parts(vlm.layers[layers[0]]).biased
    return Material(
        fit=fit,
        threshold=examples(vlm, parts["threshold"], layers, "threshold"),
        importance={layer: usage[layer].importance(downs[layer]) for layer in layers},
        directions=directions,
        biases=biased or (options.placement == "widen" and family.bias_flag is not None),
        recycle=options.placement == "recycle",
        beta=options.beta,
    )
