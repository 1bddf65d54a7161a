"""What a finished folder says of itself: report, pictures, model card, manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..export.checkpoint.rounding import Rounding
from ..export.formats.base import Notes
from ..export.publish.card import write_card
from ..export.publish.manifest import GUARD_FILE, write_manifest
from ..export.source import Source
from ..guard.base.remote_code import code_of
from ..guard.base.untrusted import printable
from ..guard.guard import Guard
from ..guard.presets import presets
from ..validators.behaviour.making import GuardOptions
from ..validators.evidence.evidence import Evidence
from ..validators.report.card import draw_pictures, markdown, pictures
from ..validators.report.page import render_page


def reports() -> list[Path]:
    """Lists what describe() writes beside the manifest; not every folder has every picture."""
    names = ("report.json", "report.html", "README.md")
    return [*map(Path, names), *map(GUARD_FILE.with_name, pictures())]


def describe(
    folder: Path,
    source: Source,
    guard: Guard,
    evidence: Evidence,
    verified: bool,
    edits: Mapping[str, Mapping[str, int]],
    options: GuardOptions,
    rounding: Rounding,
    notes: Notes,
) -> None:
    """Writes report.json, report.html, the model card and the manifest into `folder`, whose other files are complete.

    edits: layer -> kind of edit -> number of tensors that have it.  options: what the guard was made with.  notes: what
    the format that holds the guard says of itself.
    """
    figures = evidence.figures()
    described = {**guard.provenance, "interventions": guard.describe()}
    report = json.dumps({**figures, "guard": described}, indent=2) + "\n"
    (folder / "report.json").write_text(report, encoding="utf-8")
    (folder / "report.html").write_text(render_page(source.title, figures, described, edits), encoding="utf-8")
    drawn = draw_pictures((folder / GUARD_FILE).parent, figures)
    write_card(
        folder,
        source,
        guard,
        evidence.ruling,
        verified,
        markdown(figures),
        pictures={GUARD_FILE.with_name(name).as_posix(): caption for name, caption in drawn.items()},
        command=_command(source, options, notes.again),
        notes=notes,
    )
    write_manifest(folder, source, guard, rounding, evidence.ruling, verified, figures, notes.entries)


def _command(source: Source, options: GuardOptions, more: str = "") -> str:
    """Returns what makes the same folder again: options that are not the default, files by their names alone, and
    `more`.
    """
    given = {name: value for name, value in asdict(options).items() if value != getattr(GuardOptions(), name)}
    if "guard" in given and given["guard"] not in presets():
        given["guard"] = GUARD_FILE.as_posix()
    model = f"{source.name}@{source.revision}" if source.revision else source.name
    words = [
        f"--{name.replace('_', '-')} {printable(str(getattr(value, 'name', value)))}" for name, value in given.items()
    ]
    words += [f"--adapter {source.adapter['name']}"] if source.adapter else []
    words += [more] if more else []
    words += ["--trust-remote-code"] if code_of(source.folder) else []
    return " ".join(["guardfold export --model", model, *words])
