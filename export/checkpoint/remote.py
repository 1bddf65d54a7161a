"""A checkpoint on the hub, known by its config and headers alone: nothing else is downloaded, whatever its size."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import HfFileSystem

from ...guard.base.errors import InputError
from ...guard.base.hub import download_config, hub_errors, retried
from .headers import INDEX_FILE, SINGLE_FILE, header_bytes, index_shards

RANGES_AT_ONCE = 8
"""Headers that are asked for at the same time."""


def headers_only_copy(hub_id: str, revision: str | None, to: Path) -> Path:
    """Fills the empty folder `to` with what is known of a repository without its weights, and returns it: configs,
    index and files as long as the real ones that begin with their headers, the rest being holes.

    So a checkpoint opens and is checked as if it were here; what its tensors hold is not. Two range requests a shard.
    Raises InputError if the repository, its config or a header cannot be had or is not sound.
    """
    with hub_errors(f"{hub_id}: cannot be had from the Hugging Face Hub"):
        snapshot = download_config(hub_id, revision)
        for path in filter(Path.is_file, snapshot.iterdir()):
            shutil.copyfile(path.resolve(), to / path.name)
        files, commit = HfFileSystem(), snapshot.name
        single = not (to / INDEX_FILE).is_file() or _size(files, f"{hub_id}@{commit}/{SINGLE_FILE}") is not None
        names = [SINGLE_FILE] if single else index_shards(to)
        with ThreadPoolExecutor(RANGES_AT_ONCE) as pool, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            for _ in pool.map(lambda name: _headers_only(files, f"{hub_id}@{commit}/{name}", to / name), names):
                pass
    return to


def _headers_only(files: HfFileSystem, remote: str, local: Path) -> None:
    def ranged(first: int, last: int) -> bytes:
        return retried(lambda: files.cat_file(remote, start=first, end=last, cache_type="none"))

    size = _size(files, remote)
    if size is None:
        raise InputError(f"{remote}: no such file there; only safetensors checkpoints are read")
    start = ranged(0, 8)
    length = header_bytes(start, size, remote)
    with local.open("wb") as file:
        file.write(start + ranged(8, 8 + length))
        file.truncate(size)


def _size(files: HfFileSystem, remote: str) -> int | None:
    """Returns how long the file is; None if there is none."""
    try:
        return retried(lambda: files.info(remote))["size"]
    except FileNotFoundError:
        return None
