"""A guard from a model: directions, candidates, and the one that held-out anchors choose."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...export.checkpoint.config import check_new_model
from ...export.fold import Placement, widened
from ...export.model import OpenModel
from ...export.source import Source
from ...guard.base.errors import InputError
from ...guard.base.untrusted import is_file
from ...guard.fitting.calibration import BUILT_IN_BENIGN, load_benign
from ...guard.fitting.directions import Directions
from ...guard.fitting.material import Material, Settings
from ...guard.guard import Guard
from ...guard.interventions import Candidate, Intervention, TwoPass
from ...guard.model.vlm import load, threads_for
from ...guard.presets import DEFAULT_PRESET, Preset, presets
from ...guard.presets.layers import DEFAULT_LAYERS, Scope, parse_layers
from ...guard.presets.projection import MAX_ANCHORS
from ...guard.prompts.prompts import BUILT_IN_ANCHORS, beside, load_anchors
from ...guard.weight_edits import ReplaceNeurons
from .evaluation_prompts import refusal_text
from .judge import Judge, PhraseJudge
from .selection import Bench, Trial, best, choose, sample_scores, scrutinise


@dataclass(frozen=True)
class GuardOptions:
    """Which guard: a guard file, or a preset with where it acts, how strongly, and from what it is made.

    guard: a file, or the name of a preset (guard/presets).  scope, rank: of the projection.  layers: where a projection
    and a gate may act.  strength: of the projection.  None of these lets validation choose (the preset projection takes
    the last quarter in full).  false_positive_rate: share of benign prompts at which a gate may newly open; None lets
    validation choose.  placement: recycle overwrites the least used neurons, widen adds some.  beta: steepness of the
    gate's corners.  family: a file that says what writes to the residual stream in a family that has no row.
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


def guard_of(model: OpenModel, options: GuardOptions, judge: Judge | None = None) -> Guard:
    """Returns the guard that `options` describe, read from a file or made from `model`.

    judge: of answers, where candidates are chosen among; default, by phrases.

    Raises InputError for a model or prompts that cannot be used, layers out of range, or a rank above the anchors, and
    Refused if no candidate is within the limits or the detector cannot tell harmful prompts apart.
    """
    if guard := given_guard(options):
        return guard
    with threads_for(model.folder):
        return _made(model, preset_of(options), options, judge)


def given_guard(options: GuardOptions) -> Guard | None:
    """Returns the guard that `options` name a file of; None where they name a preset. InputError if the file is not
    sound.
    """
    named = options.guard.endswith(".safetensors") or is_file(options.guard)
    return Guard.load(Path(options.guard)) if named else None


def preset_of(options: GuardOptions) -> Preset:
    """Returns the preset that `options` name. InputError if there is none, or it does not have their scope."""
    preset = presets().get(options.guard)
    if preset is None:
        raise InputError(f"{options.guard}: neither a guard file nor a preset ({', '.join(presets())})")
    check_scope(preset, options.scope)
    return preset


def kinds_of(options: GuardOptions) -> tuple[type[Intervention], ...]:
    """Returns the interventions that the preset of `options` may make in their scope. Raises InputError as above."""
    makes, in_weights = preset_of(options).makes, options.scope != "residual"
    return tuple(kind for kind in makes if bool(kind.asks) == in_weights) or makes


def check_scope(preset: Preset, scope: Scope) -> None:
    """Raises InputError for a scope that `preset` does not have, naming the presets that do."""
    if scope in preset.scopes:
        return
    if scope == "shared":
        raise InputError("--scope shared: a shared projection would erase what a gate writes; use --guard projection")
    having = sorted(each.name for each in presets().values() if scope in each.scopes)
    raise InputError(f"--scope {scope}: has no {preset.name}; use --guard {' or '.join(having)}")


def _made(model: OpenModel, preset: Preset, options: GuardOptions, judge: Judge | None) -> Guard:
    folder, family = model.folder, model.family
    anchors = load_anchors(options.anchors or beside(folder, "anchors.jsonl") or BUILT_IN_ANCHORS)
    if options.rank > min(len(anchors), MAX_ANCHORS):
        raise InputError(f"--rank {options.rank}: more than the {min(len(anchors), MAX_ANCHORS)} anchor pairs")
    if options.placement == "widen" and any(ReplaceNeurons in kind.asks for kind in preset.makes):
        check_new_model(model.checkpoint, family, widened(family, model.checkpoint.shapes))
    settings = Settings(
        scope=options.scope,
        rank=options.rank,
        layers=parse_layers(options.layers, family.layers) if options.layers else None,
        strength=options.strength,
        rate=options.false_positive_rate,
        recycle=options.placement == "recycle",
        beta=options.beta,
    )
    outright = preset.outright.get(options.scope)
    benign = [] if outright else load_benign(options.benign or beside(folder, "benign.jsonl") or BUILT_IN_BENIGN)
    vlm = load(folder)
    judge = judge or PhraseJudge(refusal_text(folder))
    gains_biases = family.bias_flag is not None
    material = Material(
        vlm, anchors, benign, family.layers, sorted(family.mlps), gains_biases, settings, judge.refuses_first
    )
    provenance = {
        "guardfold": __version__,
        "model": model.source.title,
        "revision": Source(model.source.title, folder).revision,
        "anchors": {"sha256": anchors.hash, "pairs": len(anchors)},
    }
    if outright:
        candidate, directions = outright(material)
        found: dict[str, Any] = {"directions": directions.figures()}
    else:
        candidate, found = _chosen(material, preset, judge)
        directions = material.directions
    guard = Guard(candidate.interventions, json.loads(json.dumps({**provenance, **found})))
    return replace(guard, reference=_reference(directions, family.layers))


def _reference(directions: Directions, layers: int) -> TwoPass | None:
    late = [layer for layer in parse_layers(DEFAULT_LAYERS, layers) if layer in directions.bases]
    return TwoPass(directions.only(late).bases) if late else None


def _chosen(material: Material, preset: Preset, judge: Judge) -> tuple[Candidate, dict[str, Any]]:
    """Returns the best candidate of the preset's rounds on the select part, and all that was found, as JSON."""
    candidates = list(preset.rounds[0].candidates(material, None))
    bench = Bench(material.vlm, material.parts["select"], judge)
    trials: list[Trial] = []
    decided: list[dict[str, Any]] = []
    chosen_in: dict[str, Trial | None] = {}
    before: Trial | None = None
    for number, round_ in enumerate(preset.rounds):
        if number:
            candidates = list(round_.candidates(material, before.candidate if before else None))
        tried, first = bench.try_all(candidates, round_.what)
        trials += tried
        decided += first
        before = chosen_in[round_.name] = best(tried, bench.original)
    chosen, name, why = choose(preset, chosen_in)
    apart = bench.apart(before.candidate) if before and len(before.candidate.interventions) > 1 else {}
    found: dict[str, Any] = {
        "directions": material.directions.figures(),
        **material.notes,
        "selection": {
            "chosen": chosen.row(),
            "preset": name,
            "why": why,
            "original": asdict(bench.original),
            "candidates": [trial.row() for trial in trials],
            "trade_off": decided,
            "apart": apart,
            "parts": {role: len(part.harmful) for role, part in material.parts.items()},
        },
    }
    for intervention in chosen.candidate.interventions:
        if (reading := intervention.opens_on) is not None:
            held_out = material.examples("test", [reading.layer], reading.neurons)[reading.layer]
            found |= {
                "held_out": scrutinise(material.vlm, intervention, held_out),
                "scores": sample_scores(reading, held_out),
            }
    return chosen.candidate, found
