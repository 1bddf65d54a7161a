"""Does the guard's detector tell harmful requests apart? Its scores on prompts, and on anchors kept from fitting it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from torch import Tensor

from ...guard.fitting.transcripts import last_readings
from ...guard.guard import Guard
from ...guard.interventions import Reading
from ...guard.model.vlm import VLM
from ...guard.prompts.image_kinds import ImageKind
from ...guard.prompts.prompts import Prompt
from ..report.markup import note, row, section_if_sound
from ..report.plots import detector_histogram
from .piece import Piece, View


def detector_of(guard: Guard) -> Reading | None:
    """Finds the reading that opens an intervention of `guard`, the first if there are several; None if nothing does."""
    readings = (intervention.opens_on for intervention in guard.interventions)
    return next((reading for reading in readings if reading), None)


def detector_scores(vlm: VLM, detector: Reading, prompts: Sequence[Prompt], kind: ImageKind) -> Tensor:
    """Reads the score at the last token of each prompt under `kind`, [len(prompts)]."""
    what = f"detector, {kind}"
    return last_readings(vlm, prompts, kind, detector.layer, what, detector.neurons) @ detector.weights


def _section(view: View) -> Iterator[str]:
    """From what the guard's own file has of anchors that the detector was neither fitted to nor chosen on."""
    held_out, scores = view.guard.get("held_out"), view.guard.get("scores")
    if held_out:
        drawn = [partial(_histogram, view.guard["interventions"], scores)] if scores else []
        yield from section_if_sound("The gate's detector", *drawn, partial(_held_out, held_out))


def _histogram(interventions: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[float]]) -> str:
    """Returns a linear gate has no thresholds."""
    gate = next((described for described in interventions if {"t0", "t1"} <= described.keys()), None)
    return detector_histogram(scores, {name: gate[name] for name in ("t0", "t1")} if gate else {})


def _held_out(held_out: Mapping[str, Any]) -> str:
    groups = dict.fromkeys([*held_out["auc"], *held_out["opens"]])
    scored = (f"{held_out['auc'][group]:.3f}" if group in held_out["auc"] else "" for group in groups)
    opened = (_opening(held_out["opens"][group]) if group in held_out["opens"] else "" for group in groups)
    rows = (
        row(["", *map(escape, groups)], "th", 1),
        row(["AUC", *scored], numbers_from=1),
        row(["opens", *opened], numbers_from=1),
    )
    return f"<table>{''.join(rows)}</table>{note(' '.join(_remarks(held_out)))}"


def _opening(opened: Any) -> str:
    """Returns a ramp opens at a share of prompts; a linear gate by an amount, of which there are mean and deviation."""
    if isinstance(opened, float | int):
        return f"{opened:.1%}"
    mean, deviation = opened
    return f"{mean:.2f} &plusmn; {deviation:.2f}"


def _remarks(held_out: Mapping[str, Any]) -> Iterator[str]:
    yield "On anchors that it was neither fitted to nor chosen on."
    if "fires_elsewhere" in held_out:
        elsewhere = ", ".join(f"{place} {share:.2%}" for place, share in held_out["fires_elsewhere"].items())
        yield f"Fires elsewhere: {elsewhere} of positions."
    if "distance_to_clip" in held_out:
        clip = ", ".join(f"{float(beta):g}: {value:.1e}" for beta, value in held_out["distance_to_clip"].items())
        yield f"Largest distance of its ramp to the ideal clip, by beta: {clip}."


DETECTOR: Piece[None] = Piece("detector", page=_section)
