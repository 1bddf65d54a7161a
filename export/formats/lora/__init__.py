"""A guard as a PEFT LoRA adapter of a few MB, for the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....guard.base.errors import InputError
from ....guard.guard import Guard
from ...checkpoint.headers import Checkpoint
from ...checkpoint.merge import CONFIG_FILE
from ...model import OpenModel
from ..base import Format, FormatRequest, Held, Job, Notes
from .adapted import Adapted, folders
from .adapters import BIASED, adaptable, adapters, lacks, unadaptable, without
from .card import BOTH, HELD, LOAD_ADAPTER, MERGE_ADAPTER, TIED


@dataclass(frozen=True)
class Lora(Format):
    """One adapter, or two where biases change as well. It has no settings."""

    name = "lora"
    parts = "adapters"
    alone = "an adapter is for the unmodified model; write it by itself"
    relation = "adapter"
    library = "peft"

    def check(self, ask: FormatRequest) -> None:
        if ask.adapter:
            raise InputError(
                "--format lora with --adapter: it would fit the merged model, which nobody has; leave one out"
            )
        for kind in ask.kinds if ask.preset and not ask.allow_partial else ():
            if reason := lacks(kind):
                raise InputError(
                    f"--format lora: the preset {ask.preset} has a {kind.kind}: {reason}; use --guard linear or "
                    "projection, or --allow-partial to leave it out"
                )

    def hold(self, model: OpenModel, guard: Guard) -> Held:
        kept, lost = adaptable(guard)
        if kept is not None:
            whole = model.fold(kept)
            fold = without(whole, unadaptable(model.checkpoint, model.family, whole))
            lost += fold.left_out
            if fold.edits:
                return Held(kept, fold, tuple(lost))
        raise InputError(f"--format lora: no adapter holds any of this guard: {'; '.join(lost)}; use --guard linear")

    def room(self, checkpoint: Checkpoint) -> int:
        return 0

    def write(self, job: Job) -> None:
        made, _ = adapters(job.model.checkpoint, job.model.family, job.held.fold)
        for adapter, place in zip(made, (job.place, job.place / BIASED), strict=False):
            adapter.save(place, job.model.source.name, job.model.source.revision)

    def open(self, job: Job) -> Adapted:
        return Adapted(job.model.checkpoint, job.place)

    def notes(self, job: Job) -> Notes:
        family, left_out = job.model.family, job.held.left_out
        tied = family.tied and family.embedding in job.held.fold.edits
        load = [*([BOTH] if len(folders(job.place)) > 1 else []), MERGE_ADAPTER, *([TIED] if tied else [])]
        entries = {"format": self.name, "left_out": list(left_out)}
        return Notes(HELD, "\n\n".join(load), left_out, entries, f"--format {self.name}")

    @classmethod
    def found(cls, folder: Path) -> bool:
        return (folder / CONFIG_FILE).is_file()

    @classmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        return ["## Load it", LOAD_ADAPTER.format(**names)]
