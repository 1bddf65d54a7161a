"""A base model with a guard's adapters, read like a checkpoint whose weights had them merged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from ...checkpoint.edits import Edit, Folded
from ...checkpoint.headers import Checkpoint, TensorInfo
from ...checkpoint.merge import CONFIG_FILE, updates
from .adapters import BIASED


@dataclass(frozen=True)
class Adapted:
    """The checkpoint `source` with the adapters in `place`, to be read like a checkpoint in which they were merged."""

    source: Checkpoint
    place: Path

    @property
    def folder(self) -> Path:
        """Where the model's config is."""
        return self.source.folder

    @cached_property
    def edits(self) -> dict[str, list[Edit]]:
        """Tensor on disk -> what the adapters make of it."""
        found: dict[str, list[Edit]] = {}
        for folder in folders(self.place):
            for name, edits in updates(self.source, folder).items():
                found.setdefault(name, []).extend(edits)
        return found

    def info(self, name: str) -> TensorInfo:
        """Returns tensor `name`; F64, for nothing is rounded to the checkpoint's dtype."""
        info = self.source.info(name)
        return TensorInfo(name, "F64", info.shape, 0, 0)

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Returns rows first:last of tensor `name` with the adapters merged, float32 or better."""
        folded = Folded(partial(self.source.read, name), self.source.info(name).shape, self.edits.get(name, ()))
        return folded.rows(first, last)


def folders(folder: Path) -> list[Path]:
    """Where the adapters in `folder` lie, the plain or only one first."""
    return [folder, *([folder / BIASED] if (folder / BIASED / CONFIG_FILE).is_file() else [])]
