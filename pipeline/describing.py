"""What a finished folder says of itself: report, pictures, model card, manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..export.checkpoint.rounding import Rounding
from ..export.publish.card import GUARD_FILE, AdapterNotes, Source, write_card, write_manifest
from ..guard.base.remote_code import code_of
from ..guard.base.untrusted import printable
from ..guard.guard import Guard
from ..guard.presets import presets
from ..guard.prompts.image_kinds import IMAGE_KINDS
from ..validators.behaviour.making import GuardOptions
from ..validators.behaviour.measures import markdown, shown
from ..validators.evidence.evidence import Evidence
from ..validators.report.page import render_page
from ..validators.report.plots import compliance_picture

PICTURE = GUARD_FILE.with_name("compliance.png")
"""Of the card: what was complied with, by image kind."""


def describe(
    folder: Path,
    source: Source,
    guard: Guard,
    evidence: Evidence,
    verified: bool,
    *,
    edits: Mapping[str, Mapping[str, int]],
    options: GuardOptions,
    rounding: Rounding,
    notes: AdapterNotes | None,
) -> None:
    """Writes report.json, report.html, the model card and the manifest into `folder`, whose other files are complete.

    edits: layer -> kind of edit -> number of tensors that have it.  options: what the guard was made with.  notes: what
    the card says of adapters, where the folder holds those.
    """
    figures = evidence.figures()
    described = {**guard.provenance, "interventions": guard.describe()}
    report = json.dumps({**figures, "guard": described}, indent=2) + "\n"
    (folder / "report.json").write_text(report, encoding="utf-8")
    (folder / "report.html").write_text(render_page(source.title, figures, described, edits), encoding="utf-8")
    write_card(
        folder,
        source,
        guard,
        evidence.ruling,
        verified,
        markdown(figures),
        pictures=_pictures(folder, figures),
        command=_command(source, options, notes is not None),
        notes=notes,
    )
    write_manifest(folder, source, guard, rounding, evidence.ruling, verified, figures, notes)


def _pictures(folder: Path, figures: dict[str, Any]) -> dict[str, str]:
    """Draws what the card shows into `folder`: path -> caption."""
    behaviours = shown(figures)
    if not behaviours:
        return {}
    (folder / PICTURE).write_bytes(compliance_picture(behaviours, IMAGE_KINDS))
    return {PICTURE.as_posix(): "Harmful prompts complied with, by image kind, with Wilson 95 % intervals"}


def _command(source: Source, options: GuardOptions, as_adapter: bool = False) -> str:
    """What makes the same folder again: options that are not the default, files by their names alone."""
    given = {name: value for name, value in asdict(options).items() if value != getattr(GuardOptions(), name)}
    if "guard" in given and given["guard"] not in presets():
        given["guard"] = GUARD_FILE.as_posix()
    model = f"{source.name}@{source.revision}" if source.revision else source.name
    words = [
        f"--{name.replace('_', '-')} {printable(str(getattr(value, 'name', value)))}" for name, value in given.items()
    ]
    words += [f"--adapter {source.adapter['name']}"] if source.adapter else []
    words += ["--format lora"] if as_adapter else []
    words += ["--trust-remote-code"] if code_of(source.folder) else []
    return " ".join(["guardfold export --model", model, *words])
