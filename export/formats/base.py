"""What a format offers: how a guarded model is written in it, opened again, and spoken of.

A format is a frozen dataclass of its settings, in a file of its own beside this one, and a line in FORMATS. These are
asked of it, in this order:

1. `check`: can this model be written in it, with these options and interventions? Before any model is run.
2. `hold`: what of the guard is held, as edits of tensors. Before any model is run too, where the guard is a file.
3. `write`: into a folder that is published when everything is in it, and vanishes if anything fails.
4. `open`: what of that folder the evidence loads.
5. `notes` and `card`: what the manifest and the model card say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ...guard.base.errors import InputError
from ...guard.guard import Guard
from ...guard.interventions import Intervention
from ..checkpoint.headers import Checkpoint
from ..fold import Fold
from ..model import OpenModel


@dataclass(frozen=True)
class FormatRequest:
    """What a format is asked to write, as far as it is known before any model is run.

    kinds: what the guard consists of, or may.  preset: the preset that will make it; None where it is known already.
    adapter: the user's own adapter, which is merged first.  allow_partial: whether a part of the guard will do.
    """

    model: OpenModel
    kinds: tuple[type[Intervention], ...]
    preset: str | None = None
    adapter: str | None = None
    allow_partial: bool = False

    @property
    def in_weights(self) -> bool:
        """Whether weights can hold all of it."""
        return all(kind.asks for kind in self.kinds)


@dataclass(frozen=True)
class Held:
    """What a format holds of a guard: that part, the same as edits of tensors, and the rest, a line each.

    traced: whether its hooks are traced into graphs, since no weights of this model hold it; there are no edits then.
    """

    guard: Guard
    fold: Fold
    left_out: tuple[str, ...] = ()
    traced: bool = False


@dataclass(frozen=True)
class Job:
    """One artefact: what is guarded, what is held of the guard, and the folder that it is written to or lies in.

    weights: what a derived format is made of: the model with the guard in its weights, or, where those cannot hold it,
    without.  aside: a folder for what nobody is to keep.
    """

    model: OpenModel
    held: Held
    place: Path
    weights: Checkpoint
    aside: Path


@dataclass(frozen=True)
class Notes:
    """What the papers say of a format.

    held: how it holds the guard.  load: what else there is to loading it, Markdown.  left_out: what it does not hold,
    a line each.  entries: of its own in the manifest.  again: options of the command that makes it again.
    """

    held: str = "folded into its weights"
    load: str = ""
    left_out: tuple[str, ...] = ()
    entries: Mapping[str, Any] = field(default_factory=dict)
    again: str = ""


@dataclass(frozen=True)
class Format(ABC):
    """One form of a guarded model; a subclass is a frozen dataclass of its settings.

    A setting gets its value from what the user passes under the same name (Formats, `--set NAME=VALUE`).
    """

    name: ClassVar[str]
    """What --format calls it."""

    parts: ClassVar[str] = "weights"
    """What holds the guard in it, in the plural."""

    derived: ClassVar[bool] = False
    """Whether it is made of weights that have the guard in them, so that a guarded folder can be given as well."""

    alone: ClassVar[str] = ""
    """Why none other can be written beside it; empty where one can."""

    files: ClassVar[tuple[str, ...]] = ()
    """Patterns of its files: what an earlier version left in a hub repository goes when a new one is pushed."""

    relation: ClassVar[str] = "finetune"
    """What the hub calls it in relation to the model that it was made from."""

    library: ClassVar[str] = "transformers"
    """What the hub says loads it."""

    def check(self, ask: FormatRequest) -> None:
        """Raises InputError, with the reason, if what is asked for cannot be written in this format."""
        for kind in ask.kinds:
            if not kind.asks:
                raise InputError(f"{kind.kind}: weights cannot hold it; {kind.instead}")

    def hold(self, model: OpenModel, guard: Guard) -> Held:
        """Returns what this format holds of `guard` in `model`. InputError if that is nothing, or does not fit."""
        return Held(guard, model.fold(guard))

    def room(self, checkpoint: Checkpoint) -> int:
        """Returns bytes of disk that writing it takes, about."""
        return checkpoint.data_bytes

    @abstractmethod
    def write(self, job: Job) -> None:
        """Writes it into `job.place`. InputError as it reads the model; OSError as the disk does."""

    @abstractmethod
    def open(self, job: Job) -> object | None:
        """What the evidence loads of `job.place`: a Checkpoint (in `job.aside`, if it has to be unpacked first), an
        Adapted or WrittenGraphs; None if nothing is to run it, and so vouch for it.
        """

    def notes(self, job: Job) -> Notes:
        """Returns what the papers say of it."""
        return Notes()

    @classmethod
    @abstractmethod
    def found(cls, folder: Path) -> bool:
        """Whether `folder` holds it."""

    @classmethod
    @abstractmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        """How what is in `folder` is loaded: paragraphs of the model card, Markdown.

        names: source (the model that it was made from), auto (its auto class), trust and serve (what is added to
        `from_pretrained(` and `vllm serve` where it needs code of its own, else empty).
        """
