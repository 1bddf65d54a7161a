"""What a run reads: a model as it is or with an adapter merged into it, or no more than its headers; and how much of it
is written by now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..export.checkpoint.companions import copy_companions
from ..export.checkpoint.headers import Checkpoint
from ..export.checkpoint.merge import describe_adapter, merging
from ..export.checkpoint.remote import hollow_copy
from ..export.checkpoint.rewrite import Advance, rewrite
from ..export.checkpoint.staging import check_room
from ..export.families.table import family_of
from ..export.publish.card import Source
from ..guard.base.progress import bar
from ..guard.base.untrusted import check_name
from ..guard.model.vlm import located, resolve
from ..validators.evidence.loaded import check_loaded


@contextmanager
def based_on(
    folder: Path, name: str, adapter: str | None, scratch: Path, family_file: Path | None
) -> Iterator[tuple[Source, Path]]:
    """(what is guarded, the folder of its weights): the model `name` in `folder`, or, with `adapter`, that model after
    merging, which lies in `scratch` until the block ends.

    Raises InputError, naming the tensor, unless transformers loads from either what is read here (loaded.py).
    """
    source = Source(name, folder)
    check_loaded(Checkpoint.open(folder))
    if adapter is None:
        yield source, folder
        return
    place, called = resolve(adapter)
    check_name(called)
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint, family_file)
    edits = merging(checkpoint, family, place)
    check_room(scratch, checkpoint.data_bytes)
    with TemporaryDirectory(prefix=".merged-", dir=scratch) as merged:
        with written(checkpoint, "merging (MB)") as advance:
            rewrite(checkpoint, family, edits, Path(merged), advance)
        copy_companions(folder, Path(merged))
        check_loaded(Checkpoint.open(Path(merged)))
        yield replace(source, adapter=describe_adapter(called, place)), Path(merged)


@contextmanager
def headers_of(model: str) -> Iterator[Path]:
    """A folder with config and headers of `model`; of one on the hub nothing else is downloaded, and it goes away."""
    found = located(model)
    if isinstance(found, Path):
        yield found
        return
    with TemporaryDirectory() as folder, bar() as progress:
        progress.add_task("headers", total=None)
        yield hollow_copy(*found, Path(folder))


@contextmanager
def written(checkpoint: Checkpoint, what: str) -> Iterator[Advance]:
    """A progress bar over the bytes of `checkpoint`: takes the number just written."""
    with bar() as progress:
        task = progress.add_task(what, total=checkpoint.data_bytes >> 20)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done >> 20)

        yield advance
