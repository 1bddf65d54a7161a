"""What a run reads: a model as it is or with an adapter merged into it, or no more than its headers; and where it may
write.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..export.checkpoint.companions import copy_companions
from ..export.checkpoint.merge import describe_adapter, merging
from ..export.checkpoint.remote import headers_only_copy
from ..export.checkpoint.rewrite import rewrite
from ..export.checkpoint.staging import check_room
from ..export.model import OpenModel
from ..export.source import Source
from ..guard.base.errors import InputError
from ..guard.base.progress import bar, megabytes
from ..guard.base.untrusted import check_name
from ..guard.model.vlm import located, resolve
from ..validators.evidence.loaded import check_loaded


def open_source(model: str, family_file: Path | None = None) -> OpenModel:
    """Returns the model called `model`: demo, alias, hub id or folder. Raises InputError if it cannot be had."""
    folder, name = resolve(model)
    return OpenModel(Source(name, folder), folder, family_file)


@contextmanager
def based_on(model: OpenModel, adapter: str | None, scratch: Path) -> Iterator[OpenModel]:
    """What is guarded: `model`, or, with `adapter`, that model after merging, which lies in `scratch` until the block
    ends. Raises InputError, naming the tensor, unless transformers loads from either what is read here (loaded.py).
    """
    check_loaded(model.checkpoint)
    if adapter is None:
        yield model
        return
    place, called = resolve(adapter)
    check_name(called)
    edits = merging(model.checkpoint, model.family, place)
    check_room(scratch, model.checkpoint.data_bytes)
    with TemporaryDirectory(prefix=".merged-", dir=scratch) as merged:
        with megabytes(model.checkpoint.data_bytes, "merging") as advance:
            rewrite(model.checkpoint, model.family, edits, Path(merged), advance)
        copy_companions(model.folder, Path(merged))
        source = replace(model.source, adapter=describe_adapter(called, place))
        made = OpenModel(source, Path(merged), model.family_file)
        check_loaded(made.checkpoint)
        yield made


@contextmanager
def headers_of(model: str) -> Iterator[Path]:
    """A folder with config and headers of `model`; of one on the hub nothing else is downloaded, and it goes away."""
    found = located(model)
    if isinstance(found, Path):
        yield found
        return
    with TemporaryDirectory() as folder, bar() as progress:
        progress.add_task("headers", total=None)
        yield headers_only_copy(*found, Path(folder))


def output_for(model: OpenModel, output: Path | str) -> Path:
    """Returns `output`. InputError if writing it would replace `model`."""
    if Path(os.path.realpath(model.source.folder)).is_relative_to(os.path.realpath(output)):
        raise InputError(f"{output}: holds the model itself; choose another --output")
    return Path(output)
