"""What is made of a fold beside weights: graphs and adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from ..export.checkpoint.headers import Checkpoint
from ..export.families.table import Family
from ..export.fold import Fold, fold
from ..export.formats.formats import Formats
from ..export.formats.lora import BIASED, Adapter, adaptable, adapters, lacks, without
from ..export.formats.lora_card import notes
from ..export.formats.onnx.graphs import Plan, write_graphs
from ..export.publish.card import AdapterNotes, Source
from ..guard.base.errors import InputError
from ..guard.guard import Guard
from ..guard.presets import presets
from ..validators.behaviour.making import GuardOptions
from ..validators.evidence.runtime import Runtime, check_graphs


def vouched(runtime: Runtime | None) -> bool:
    """Whether graphs ran and do what torch does."""
    return runtime is not None and runtime.vouched


@contextmanager
def weights_place(stage: Path, formats: Formats) -> Iterator[Path]:
    """Where the folded weights go: into `stage`, or, where nobody wants them but the graphs, aside and away."""
    if formats.has("safetensors") or formats.has("lora"):
        yield stage
        return
    with TemporaryDirectory(dir=stage, prefix=".weights-") as aside:
        yield Path(aside)


def graphs(
    weights: Path, original: Path | None, stage: Path, plan: Plan, guard: Guard, formats: Formats
) -> Runtime | None:
    """Writes the graphs of the model in `weights` into `stage` and compares them with torch, unless told not to."""
    if weights != stage:
        shutil.copyfile(weights / "config.json", stage / "config.json")
    write_graphs(Checkpoint.open(weights), stage, plan)
    return None if formats.skip_runtime else check_graphs(stage, plan, weights, original, guard, formats.provider)


def check_adapters(formats: Formats, options: GuardOptions, adapter: str | None, allow_partial: bool) -> None:
    """InputError for --format lora of what no adapter can be."""
    if not formats.has("lora"):
        return
    if adapter:
        raise InputError("--format lora with --adapter: it would fit the merged model, which nobody has; leave one out")
    preset = presets().get(options.guard)
    for kind in preset.makes if preset and not allow_partial else ():
        reason = lacks(kind) if kind.asks or options.scope == "residual" else None
        if reason:
            raise InputError(
                f"--format lora: the preset {options.guard} has a {kind.kind}: {reason}; use --guard linear or "
                "projection, or --allow-partial to leave it out"
            )


def write_adapters(
    stage: Path, checkpoint: Checkpoint, family: Family, guard: Guard, source: Source, allow_partial: bool
) -> tuple[Guard, Fold, AdapterNotes]:
    """(what adapters hold of `guard`, the same as a fold, what the card says), the adapters being written into `stage`.

    Raises InputError if they do not hold all of it, unless `allow_partial`, or nothing.
    """
    kept, lost = adaptable(guard)
    edits, made = Fold({}), list[Adapter]()
    if kept is not None:
        whole = fold(kept, family, checkpoint.shapes, checkpoint.read)
        made, left_out = adapters(checkpoint, family, whole)
        edits = without(whole, left_out)
        lost += edits.left_out
    if not made or kept is None:
        raise InputError(f"--format lora: no adapter holds any of this guard: {'; '.join(lost)}; use --guard linear")
    if lost and not allow_partial:
        raise InputError(f"--format lora: adapters do not hold {'; '.join(lost)}; leave it out with --allow-partial")
    for each, place in zip(made, (stage, stage / BIASED), strict=False):
        each.save(place, source.name, source.revision)
    return kept, edits, notes(stage, family.tied and family.embedding in edits.edits, lost)
