"""Formats, written one after the other, each opened again when it is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..export.checkpoint.headers import Checkpoint
from ..export.formats.base import Format, Held, Job
from ..export.model import OpenModel


@dataclass(frozen=True)
class Artefact:
    """What was written: in which format, out of what, and what the evidence is to load of it; None: nothing."""

    form: Format
    job: Job
    opened: object | None


def write_all(places: Iterable[tuple[Format, Path]], model: OpenModel, held: Held, aside: Path) -> Iterator[Artefact]:
    """Writes formats to their places, what others are made of first; each is made when the one before was dealt with.

    held: what they hold of the guard.  aside: a folder for what nobody is to keep.  Raises InputError as they do, and
    OSError as the disk does.
    """
    weights = model.checkpoint
    for form, place in places:
        place.mkdir(exist_ok=True)
        job = Job(model, held, place, weights, aside)
        form.write(job)
        artefact = Artefact(form, job, form.open(job))
        yield artefact
        if isinstance(artefact.opened, Checkpoint) and not form.derived:
            weights = artefact.opened
