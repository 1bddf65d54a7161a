"""The run, from a model to a guarded one: extract -> fold -> check -> publish. What Python users call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .export.card import GUARD_FILE, Source, write_card, write_manifest
from .export.checkpoint import Checkpoint
from .export.fold import fold
from .export.rewrite import copy_companions, rewrite, staging
from .export.writers import Family, family_of
from .guard.directions import extract
from .guard.errors import InputError
from .guard.guard import Guard
from .guard.presets import DEFAULT_LAYERS, Scope, parse_layers, projection
from .guard.progress import bar
from .guard.prompts import BUILT_IN_ANCHORS, load_anchors
from .guard.vlm import load, resolve
from .validators.check import Evidence, examine
from .validators.probes import load_probes
from .validators.verdict import Refused

DEFAULT_PRESET = "projection"
PRESETS = (DEFAULT_PRESET,)
MAX_ANCHORS = 100
"""Pairs used for the directions (the paper's N); more are kept for what must not see the same pairs."""


@dataclass(frozen=True)
class GuardOptions:
    """Which guard: a guard file, or a preset with where it acts, how strongly, and from which anchors it is made."""

    guard: str = DEFAULT_PRESET
    scope: Scope = "sublayers"
    layers: str = DEFAULT_LAYERS
    rank: int = 1
    strength: float = 1.0
    anchors: Path | None = None


@dataclass(frozen=True)
class Export:
    """A finished export: where it lies, its guard, and the evidence about it."""

    folder: Path
    guard: Guard
    evidence: Evidence

    @property
    def verified(self) -> bool:
        return self.evidence.sound and self.evidence.ruling == "safer"


class NotSafer(Refused):
    """Nothing was published: the evidence says why."""

    def __init__(self, evidence: Evidence) -> None:
        first, *others = evidence.reasons
        more = f" (and {len(others)} more reasons)" if others else ""
        if evidence.sound:
            super().__init__(f"{evidence.ruling}: {first}{more}; nothing was written (--allow-weaker overrides)")
        else:
            super().__init__(f"not sound: {first}{more}; nothing was written")
        self.evidence = evidence


def extract_guard(model: str, options: GuardOptions | None = None) -> Guard:
    """The guard that `options` describe: read from a file, or extracted from `model` (the demo, an alias, a hub id, a
    folder).

    Raises InputError for a model or anchors that cannot be used, layers out of range, or a rank above the anchors.
    """
    options = options or GuardOptions()
    folder, name = resolve(model)
    if options.guard.endswith(".safetensors") or Path(options.guard).is_file():
        return Guard.load(Path(options.guard))
    if options.guard not in PRESETS:
        raise InputError(f"{options.guard}: neither a guard file nor a preset ({', '.join(PRESETS)})")
    beside = folder / "anchors.jsonl"
    anchors = load_anchors(options.anchors or (beside if beside.is_file() else BUILT_IN_ANCHORS)).head(MAX_ANCHORS)
    if options.rank > len(anchors):
        raise InputError(f"--rank {options.rank}: more than the {len(anchors)} anchor pairs")
    vlm = load(folder)
    layers = parse_layers(options.layers, len(vlm.layers))
    directions = extract(vlm, anchors, layers, options.rank)
    provenance = {
        "guardfold": __version__,
        "model": name,
        "revision": Source(name, folder).revision,
        "anchors": {"sha256": anchors.hash, "pairs": len(anchors)},
        "directions": directions.figures(),
    }
    return projection(directions, options.scope, options.strength, json.loads(json.dumps(provenance)))


def extract_to(output: Path, model: str, options: GuardOptions, *, overwrite: bool = False) -> Guard:
    """Extracts a guard into the file `output`. InputError if that exists (without `overwrite`) or cannot be."""
    if output.exists() and not (overwrite and output.is_file()):
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    guard = extract_guard(model, options)
    guard.save(output)
    return guard


def export_guarded(
    model: str,
    output: Path | str | None = None,
    options: GuardOptions | None = None,
    *,
    probes: Path | None = None,
    qa: Path | None = None,
    skip_behaviour: bool = False,
    allow_weaker: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes `model` with a guard folded into its weights to `output` (default ./<name>-guarded), if it is safer.

    probes, qa: files that replace the model's own or
    the built-in ones.  skip_behaviour: measure nothing but soundness and equality; the manifest says NOT VERIFIED.
    allow_weaker: publish whatever the verdict; the manifest and the card say NOT VERIFIED.
    Raises InputError for what cannot be used, and NotSafer, leaving nothing behind, if the result is not safer or not
    equal to its hooks (the latter is never published).
    """
    folder, name = resolve(model)
    source, checkpoint = Source(name, folder), Checkpoint.open(folder)
    family = family_of(checkpoint)
    asked = None if skip_behaviour else load_probes(folder, probes, qa)
    target = Path(output) if output else Path(f"{name.rpartition('/')[2]}-guarded")
    with staging(target, overwrite) as stage:
        guard = extract_guard(model, options)
        edits = fold(guard, family, checkpoint.shapes)
        with _writing(checkpoint) as advance:
            rewrite(checkpoint, family, edits, stage, advance)
        copy_companions(folder, stage)
        (stage / GUARD_FILE).parent.mkdir()
        guard.save(stage / GUARD_FILE)
        evidence = examine(checkpoint, Checkpoint.open(stage), family, guard, edits, asked)
        verified = evidence.sound and evidence.ruling == "safer"
        if not evidence.sound or not (verified or allow_weaker or skip_behaviour):
            raise NotSafer(evidence)
        figures = evidence.figures()
        (stage / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        write_card(stage, source, guard, evidence.ruling, verified, figures)
        write_manifest(stage, source, guard, evidence.ruling, verified, figures)
    return Export(target, guard, evidence)


def check_guarded(
    folder: Path, against: str, *, probes: Path | None = None, qa: Path | None = None, skip_behaviour: bool = False
) -> Evidence:
    """The evidence about the guarded `folder`, measured afresh against the model that it was made from.

    Raises InputError if either cannot be loaded or `folder` brings no guard file.
    """
    origin, _ = resolve(against)
    checkpoint = Checkpoint.open(origin)
    family = family_of(checkpoint)
    guard = Guard.load(folder / GUARD_FILE)
    edits = fold(guard, family, checkpoint.shapes)
    asked = None if skip_behaviour else load_probes(origin, probes, qa)
    return examine(checkpoint, Checkpoint.open(folder), family, guard, edits, asked)


def inspect_model(model: str) -> tuple[Checkpoint, Family]:
    """The checkpoint and family of `model`, from its config and headers alone. Raises InputError if unsupported."""
    folder, _ = resolve(model)
    checkpoint = Checkpoint.open(folder)
    return checkpoint, family_of(checkpoint)


@contextmanager
def _writing(checkpoint: Checkpoint) -> Iterator[Any]:
    with bar() as progress:
        task = progress.add_task("folding (MB)", total=checkpoint.data_bytes >> 20)
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            progress.update(task, completed=written >> 20)

        yield advance
