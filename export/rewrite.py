"""The streaming rewriter: a checkpoint's bytes go from folder to folder, edited tensors in blocks of rows.

Unedited tensors are copied as bytes and stay identical; the header is kept unless a tensor is added. Nothing is ever
held whole, so memory does not grow with the model.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..guard.errors import InputError
from .checkpoint import DTYPES, INDEX_FILE, Checkpoint, Shard, TensorInfo, open_regular, read_rows
from .fold import Edit, Fold, Folded, row_blocks
from .writers import Family

COPY_BYTES = 64 * 2**20
COPIED_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".txt", ".ppm", ".png", ".jpg", ".jpeg"}
COPIED_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_COPIED = {INDEX_FILE, "config.json", "guardfold.json", "report.json", "adapter_config.json"}
MAX_COPIED_BYTES = 256 * 2**20

Advance = Callable[[int], None]
"""Called with the number of bytes just written."""


@contextmanager
def staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` when the block ends well, and vanishes when it does not.

    Raises InputError if `output` exists and may not be overwritten, or its parent cannot be written to.
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.guardfold-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output.parent}: cannot be written to ({error.strerror})") from error
    temporary.chmod(0o755)
    try:
        yield temporary
        _sync(temporary)
        _publish(temporary, output, overwrite)
    except OSError as error:
        raise InputError(f"{error.filename or output}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in [*(each for each in folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(temporary: Path, output: Path, overwrite: bool) -> None:
    if output.exists():
        if not overwrite:
            raise InputError(f"{output}: appeared while this export ran; nothing was overwritten")
        aside = temporary.with_name(temporary.name + "-old")
        output.rename(aside)
        temporary.rename(output)
        shutil.rmtree(aside)
    else:
        temporary.rename(output)
    descriptor = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rewrite(checkpoint: Checkpoint, family: Family, fold: Fold, target: Path, advance: Advance) -> None:
    """Writes `checkpoint` with `fold` applied into the existing folder `target`: shards, index, config.

    Raises InputError if an edited tensor is not finite or a file changes while it is read; OSError as the disk does.
    """
    added = {family.embedding: family.untied_head} if fold.untie else {}
    for shard in checkpoint.shards:
        _write_shard(checkpoint.folder, shard, fold.edits, added, target / shard.path.name, advance)
    if checkpoint.index is not None:
        _write_json(target / INDEX_FILE, _new_index(checkpoint, added))
    _write_json(target / "config.json", _untied(checkpoint.config) if fold.untie else checkpoint.config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _untied(config: Mapping[str, object]) -> dict[str, object]:
    text = config.get("text_config")
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(text, dict):
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def _new_index(checkpoint: Checkpoint, added: Mapping[str, str]) -> dict[str, object]:
    assert checkpoint.index is not None
    index = {**checkpoint.index, "weight_map": dict(checkpoint.index["weight_map"])}
    for source, name in added.items():
        shard, info = checkpoint.tensors[source]
        index["weight_map"][name] = shard.path.name
        if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
            total = index["metadata"]["total_size"] + info.end - info.begin
            index["metadata"] = {**index["metadata"], "total_size": total}
    return index


def _write_shard(
    folder: Path,
    shard: Shard,
    edits: Mapping[str, Sequence[Edit]],
    added: Mapping[str, str],
    to: Path,
    advance: Advance,
) -> None:
    copies = {name: shard.tensors[source] for source, name in added.items() if source in shard.tensors}
    header = _extended_header(shard, copies) if copies else shard.header
    source = open_regular(folder, shard.path.name)
    target = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        start = 8 + len(header)
        reached = start + max((info.end for info in shard.tensors.values()), default=0)
        os.posix_fallocate(target, 0, reached + sum(info.end - info.begin for info in copies.values()))
        _write_exactly(target, struct.pack("<Q", len(header)) + header, 0)
        for infos in _runs(shard, edits):
            if infos[0].name in edits:
                _write_edited(source, target, shard, infos[0], edits[infos[0].name], start)
            else:
                _copy(source, target, shard, infos[0].begin, infos[-1].end, start + infos[0].begin)
            advance(infos[-1].end - infos[0].begin)
        for info in copies.values():
            _copy(source, target, shard, info.begin, info.end, reached)
            reached += info.end - info.begin
    finally:
        os.close(source)
        os.close(target)


def _extended_header(shard: Shard, copies: Mapping[str, TensorInfo]) -> bytes:
    header = json.loads(shard.header)
    reached = max(info.end for info in shard.tensors.values())
    for name, info in copies.items():
        size = info.end - info.begin
        offsets = [reached, reached + size]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        reached += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _runs(shard: Shard, edits: Mapping[str, Sequence[Edit]]) -> Iterator[list[TensorInfo]]:
    """The shard's tensors in the order of their data: each edited one alone, neighbours that are copied together."""
    run: list[TensorInfo] = []
    for info in shard.tensors.values():
        if info.name in edits or (run and info.end - run[0].begin > COPY_BYTES):
            if run:
                yield run
            run = []
        if info.name in edits:
            yield [info]
        else:
            run.append(info)
    if run:
        yield run


def _copy(source: int, target: int, shard: Shard, begin: int, end: int, to: int) -> None:
    """Copies data bytes begin:end of `shard` to offset `to`; within the kernel where the system can."""
    start = shard.data_start + begin
    done, size = 0, end - begin
    while done < size:
        chunk = min(COPY_BYTES, size - done)
        try:
            count = os.copy_file_range(source, target, chunk, start + done, to + done)
        except OSError:
            count = _write_exactly(target, os.pread(source, chunk, start + done), to + done)
        if count == 0:
            raise InputError(f"{shard.path}: ends at byte {start + done}; it was cut short while being read")
        done += count


def _write_exactly(target: int, data: Any, offset: int) -> int:
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
    return done


def _write_edited(source: int, target: int, shard: Shard, info: TensorInfo, edits: Sequence[Edit], start: int) -> None:
    """Streams one tensor through its edits, rounding to its own dtype (to nearest) at the end."""
    folded = Folded(partial(read_rows, source, shard, info), info.shape, edits)
    for first, last in row_blocks(info.shape):
        rounded = folded.rows(first, last).to(DTYPES[info.dtype])
        if not torch.isfinite(rounded).all():
            raise InputError(
                f"{shard.path}: tensor {info.name!r} has NaN or Inf (or overflows {info.dtype} when folded)"
            )
        _write_exactly(
            target, rounded.contiguous().view(torch.uint8).numpy(), start + info.begin + first * info.row_bytes
        )


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs beside the weights: tokenizer, processor, generation config, prompt files, licence.

    Never code, weights or pickles; never a link that leaves the folder. What `target` holds already is kept.
    """
    for path in sorted([*source.glob("*"), *source.glob("images/*")]):
        relative = path.relative_to(source)
        wanted = path.suffix.lower() in COPIED_SUFFIXES or path.name.startswith(COPIED_PREFIXES)
        if not wanted or path.name in NOT_COPIED or path.is_dir() or (target / relative).exists():
            continue
        with os.fdopen(open_regular(source, str(relative)), "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_COPIED_BYTES:
                raise InputError(f"{path}: larger than {MAX_COPIED_BYTES} bytes; not a tokenizer or config file")
            (target / relative).parent.mkdir(exist_ok=True)
            (target / relative).write_bytes(file.read())
