"""The streaming rewriter: a checkpoint's bytes go from folder to folder, edited tensors in blocks of rows.

Unedited tensors are copied as bytes and stay identical; the header is kept unless a tensor is added. Nothing is ever
held whole, so memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..guard.errors import InputError
from .checkpoint import DTYPES, INDEX_FILE, Checkpoint, Shard, TensorInfo, open_regular, read_rows
from .edits import Edit, Folded, row_blocks
from .fold import Fold
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
    added: dict[str, str] = {}
    sizes = 0
    for shard in checkpoint.shards:
        outputs = list(_outputs(shard, family, fold))
        _write_shard(checkpoint.folder, shard, outputs, target / shard.path.name, advance)
        added |= {each.info.name: shard.path.name for each in outputs if each.info.name not in shard.tensors}
        sizes += sum(each.info.end - each.info.begin for each in outputs)
    if checkpoint.index is not None:
        _write_json(target / INDEX_FILE, _new_index(checkpoint.index, added, sizes))
    _write_json(target / "config.json", _new_config(checkpoint.config, family, fold))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _new_config(config: Mapping[str, Any], family: Family, fold: Fold) -> Mapping[str, Any]:
    tie = {"tie_word_embeddings": False} if family.embedding in fold.edits else {}
    text = {**fold.text_config, **tie}
    if not text:
        return config
    if family.text_config_key is None:
        return {**config, **text}
    return {**config, family.text_config_key: {**config.get(family.text_config_key, {}), **text}, **tie}


def _new_index(index: Mapping[str, Any], added: Mapping[str, str], size: int) -> dict[str, Any]:
    changed = {**index, "weight_map": {**index["weight_map"], **added}}
    if isinstance(index.get("metadata"), dict) and "total_size" in index["metadata"]:
        changed["metadata"] = {**index["metadata"], "total_size": size}
    return changed


@dataclass(frozen=True)
class _Output:
    """A tensor to be written: what it will be, what it is read from (None: zeros), its edits (None: a plain copy)."""

    info: TensorInfo
    source: TensorInfo | None
    edits: Sequence[Edit] | None


def _outputs(shard: Shard, family: Family, fold: Fold) -> Iterator[_Output]:
    """The tensors of the new shard in the order of their data: those there were, then those the fold adds."""
    reached = 0

    def placed(name: str, like: TensorInfo, shape: Sequence[int]) -> TensorInfo:
        nonlocal reached
        begin, reached = reached, reached + math.prod(shape) * DTYPES[like.dtype].itemsize
        return TensorInfo(name, like.dtype, tuple(shape), begin, reached)

    for info in shard.tensors.values():
        edits = fold.edits.get(info.name, ()) if info.name in fold.changed else None
        yield _Output(placed(info.name, info, fold.grown.get(info.name, info.shape)), info, edits)
    if fold.untie and family.embedding in shard.tensors:
        embedding = shard.tensors[family.embedding]
        yield _Output(placed(family.untied_head, embedding, embedding.shape), embedding, None)
    for name, like in fold.new.items():
        if like in shard.tensors:
            yield _Output(placed(name, shard.tensors[like], fold.grown[name]), None, fold.edits.get(name, ()))


def _write_shard(folder: Path, shard: Shard, outputs: Sequence[_Output], to: Path, advance: Advance) -> None:
    same = all(each.info == each.source for each in outputs)
    header = shard.header if same else _new_header(shard, outputs)
    start = 8 + len(header)
    source = open_regular(folder, shard.path.name)
    target = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(target, 0, start + max((each.info.end for each in outputs), default=0))
        _write_exactly(target, struct.pack("<Q", len(header)) + header, 0)
        for run in _runs(outputs):
            first, last = run[0], run[-1]
            if first.edits is not None:
                _write_edited(source, target, shard, first, start)
            elif first.source and last.source:
                _copy(source, target, shard, first.source.begin, last.source.end, start + first.info.begin)
            advance(last.info.end - first.info.begin)
    finally:
        os.close(source)
        os.close(target)


def _new_header(shard: Shard, outputs: Sequence[_Output]) -> bytes:
    entries = {
        each.info.name: {
            "dtype": each.info.dtype,
            "shape": list(each.info.shape),
            "data_offsets": [each.info.begin, each.info.end],
        }
        for each in outputs
    }
    table = {"__metadata__": shard.metadata, **entries} if shard.metadata else entries
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def _runs(outputs: Sequence[_Output]) -> Iterator[list[_Output]]:
    """The outputs in order: each edited one alone, copies that are neighbours before and after together."""
    run: list[_Output] = []
    for each in outputs:
        if run and not (_adjoin(run[-1], each) and each.info.end - run[0].info.begin <= COPY_BYTES):
            yield run
            run = []
        run.append(each)
    if run:
        yield run


def _adjoin(one: _Output, next_: _Output) -> bool:
    if one.edits is not None or next_.edits is not None or one.source is None or next_.source is None:
        return False
    return one.source.end == next_.source.begin


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


def _write_edited(source: int, target: int, shard: Shard, output: _Output, start: int) -> None:
    """Streams one tensor through its edits, rounding to its own dtype (to nearest) at the end."""
    info, had = output.info, output.source.shape if output.source else (0, *output.info.shape[1:])
    read = partial(read_rows, source, shard, output.source or info)
    folded = Folded(read, had, output.edits or (), info.shape)
    for first, last in row_blocks(info.shape):
        rounded = folded.rows(first, last).to(DTYPES[info.dtype])
        if not torch.isfinite(rounded).all():
            raise InputError(
                f"{shard.path}: tensor {info.name!r} has NaN or Inf (or overflows {info.dtype} when folded)"
            )
        data = rounded.contiguous().view(torch.uint8).numpy()
        _write_exactly(target, data, start + info.begin + first * info.row_bytes)


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
