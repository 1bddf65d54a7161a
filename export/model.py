"""A model folder that is opened once a run: its headers, its class without weights, its family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..guard.base.errors import InputError
from ..guard.guard import Guard
from .checkpoint.headers import Checkpoint
from .families.table import Family, family_of
from .fold import Fold, fold
from .source import Source


@dataclass(frozen=True)
class OpenModel:
    """The model that is guarded, passed down from whoever opens it. What it holds is read when first asked for, and
    then kept; of the weights nothing is.

    source: what it is called.  folder: its files: the source's, or those of the source after merging an adapter.
    family_file: rows that go before the built-in ones.  InputError, of whatever is asked first, for a folder that is
    not sound, a family without a row, or a class that transformers cannot build.
    """

    source: Source
    folder: Path
    family_file: Path | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.folder)

    @cached_property
    def family(self) -> Family:
        return family_of(self.checkpoint, self.family_file)

    def fold(self, guard: Guard) -> Fold:
        """Returns `guard` as edits of this model's tensors. InputError if it does not fit or weights cannot hold it."""
        return fold(guard, self.family, self.checkpoint.shapes, self.checkpoint.read)

    def holds(self, guard: Guard) -> bool:
        """Tells whether the weights of this model can hold `guard`. InputError if it does not fit the model at all."""
        guard.check_fits(self.family.layers, self.family.width)
        if not guard.in_weights:
            return False
        try:
            self.fold(guard)
        except InputError:
            return False
        return True
