"""A folder of safetensors, untrusted: headers, index and offsets are checked here before a byte of data is used."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ...guard.base.errors import InputError, first_line
from ...guard.base.hub import MAX_INDEX_BYTES
from ...guard.base.untrusted import nested_values, open_regular, parse_object, read_bytes
from ...guard.model.loading import DTYPES as LOADED_IN
from ...guard.model.vlm import check_weights, meta_model, read_config

MAX_HEADER_BYTES = 100 * 2**20
"""The limit that the safetensors format itself sets for a header."""
MAX_DIMENSIONS = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
EDITABLE = ("F32", "F16", "BF16", "F64")
QUANTISED = (
    "quantised checkpoints are not folded: guard the base model and quantise the result again, "
    "or put the guard beside this one as a LoRA adapter made from the base model"
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: dtype by its safetensors name, shape, and byte offsets into the shard's data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, a slice along the first axis; of the one element where there is no axis."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stamp:
    """What of a file's state changes when somebody else writes it or puts another in its place."""

    device: int
    inode: int
    size: int
    modified: int


def _stamp(descriptor: int) -> Stamp:
    found = os.fstat(descriptor)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header's bytes as they are, and its tensors in the order of their data."""

    path: Path
    header: bytes
    tensors: dict[str, TensorInfo]
    stamp: Stamp
    """The file's when the header was read."""

    @property
    def data_start(self) -> int:
        return 8 + len(self.header)

    @property
    def metadata(self) -> dict[str, str]:
        return json.loads(self.header).get("__metadata__", {})

    def check_unchanged(self) -> None:
        """Raises InputError if the file is no longer the one whose header was read."""
        descriptor = open_regular(self.path.parent, self.path.name)
        try:
            header = os.pread(descriptor, len(self.header), 8)
            if _stamp(descriptor) != self.stamp or header != self.header:
                raise InputError(f"{self.path}: was changed while being read; run again when nobody writes it")
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Checkpoint:
    """config.json and every shard's header of a model folder; data is read on demand, never as a whole. Opened once a
    run and passed down, for what is worked out from it is kept.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Returns the checkpoint in `folder`. InputError in one line for whatever is not as the format says."""
        config = read_config(folder)
        _refuse_quantised(folder, config)
        check_weights(folder)
        single, index_path = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists():
            return cls(folder, config, (read_shard(folder, SINGLE_FILE),), None)
        if not index_path.exists():
            raise InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}")
        index = _read_index(folder)
        _check_dtype(folder, config, index["metadata"])
        shards = tuple(read_shard(folder, name) for name in index_shards(folder))
        _check_index(folder, index["weight_map"], shards)
        return cls(folder, config, shards, index)

    @cached_property
    def tensors(self) -> dict[str, tuple[Shard, TensorInfo]]:
        return {info.name: (shard, info) for shard in self.shards for info in shard.tensors.values()}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without its weights (meta_model), to be asked about names and shapes and left as it is.

        Raises InputError if transformers cannot build it.
        """
        return meta_model(self.folder)

    def own_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Returns the same for one who changes it or computes in `dtype`. Raises as above."""
        return deepcopy(self.model) if dtype == torch.float32 else meta_model(self.folder, dtype)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor's name -> shape."""
        return {name: info.shape for name, (_, info) in self.tensors.items()}

    @property
    def data_bytes(self) -> int:
        return sum(info.end - info.begin for _, info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        return self.tensors[name][1]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Returns rows first:last (default all) of tensor `name`, in its own dtype, on the CPU."""
        info = self.info(name)
        last = (info.shape[0] if info.shape else 1) if last is None else last
        return as_tensor(self.read_bytes(name, first, last), info)

    def read_bytes(self, name: str, first: int, last: int) -> bytearray:
        """Returns the bytes of rows first:last of tensor `name`."""
        shard, info = self.tensors[name]
        descriptor = open_regular(self.folder, shard.path.name)
        try:
            return read_row_bytes(descriptor, shard, info, first, last)
        finally:
            os.close(descriptor)


def _refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    parts = (part for part in nested_values(config) if isinstance(part, dict))
    found = next((entry for part in parts if (entry := part.get("quantization_config")) is not None), None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise InputError(f"{folder}: quantised ({method or 'quantization_config in config.json'}); {QUANTISED}")


def as_tensor(data: bytearray, info: TensorInfo) -> Tensor:
    """Returns the rows of `info`'s tensor that `data` holds, sharing its memory."""
    rows = len(data) // info.row_bytes if info.row_bytes else info.shape[0]
    shape = (rows, *info.shape[1:]) if info.shape else ()
    if not data:
        return torch.empty(shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(shape)


def read_row_bytes(descriptor: int, shard: Shard, info: TensorInfo, first: int, last: int) -> bytearray:
    """Returns rows first:last of a tensor of the open shard `descriptor`. InputError if the file is cut short."""
    data = bytearray((last - first) * info.row_bytes)
    read_exactly(descriptor, memoryview(data), shard.data_start + info.begin + first * info.row_bytes, shard.path)
    return data


def read_rows(descriptor: int, shard: Shard, info: TensorInfo, first: int, last: int) -> Tensor:
    """Returns the same rows as a tensor of their own dtype."""
    return as_tensor(read_row_bytes(descriptor, shard, info, first, last), info)


def read_exactly(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    """Fills `into` from `offset`; InputError if the file ends first."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise InputError(f"{path}: cannot be read at byte {offset + done} ({error.strerror})") from error
        if count == 0:
            raise InputError(f"{path}: ends at byte {offset + done}; it was cut short while being read")
        done += count


def read_shard(folder: Path, name: str) -> Shard:
    """Returns the header of one safetensors file, every entry checked. InputError naming file and tensor otherwise."""
    path = folder / name
    with os.fdopen(open_regular(folder, name), "rb") as file:
        stamp = _stamp(file.fileno())
        header = file.read(header_bytes(file.read(8), stamp.size, str(path)))
    tensors = parse_header(header, stamp.size, str(path))
    try:
        with safe_open(path, "pt"):
            return Shard(path, header, tensors, stamp)
    except Exception as error:  # what is sound here and not there is read by nobody else
        raise InputError(f"{path}: safetensors does not read it ({first_line(error)})") from error


def header_bytes(start: bytes, size: int, where: str) -> int:
    """Returns how long the header is of a safetensors file of `size` bytes whose first 8 are `start`; it follows them.

    InputError that begins with `where` if the file cannot hold it or the format does not allow it.
    """
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise InputError(f"{where}: not a safetensors file (header of {length} bytes in a file of {size})")
    return length


def parse_header(header: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """Returns the tensors of a safetensors file of `size` bytes, in the order of their data, every entry checked.

    InputError that begins with `where` for whatever is not as the format says.
    """
    entries = parse_object(header, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{where}: __metadata__ is not an object of strings")
    infos = sorted((_parse_entry(where, *entry) for entry in entries.items()), key=lambda info: (info.begin, info.end))
    reached = 0
    for info in infos:
        if info.begin != reached:
            raise InputError(f"{where}: tensor {info.name!r} overlaps another or leaves a gap at byte {reached}")
        reached = info.end
    described = 8 + len(header) + reached
    if described != size:
        raise InputError(f"{where}: {size} bytes long, its header describes {described}")
    return {info.name: info for info in infos}


def _parse_entry(file: str, name: str, entry: Any) -> TensorInfo:
    where = f"{file}: tensor {name!r}"
    if not name or not name.isprintable() or "/" in name or "\\" in name or ".." in name:
        raise InputError(f"{where}: not a tensor name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(n) for n in shape):
        raise InputError(f"{where}: bad shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise InputError(f"{where}: bad data_offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InputError(f"{where}: {offsets[1] - offsets[0]} bytes do not hold {dtype} of shape {shape}")
    return TensorInfo(name, dtype, tuple(shape), *offsets)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    index = parse_object(read_bytes(folder, INDEX_FILE, MAX_INDEX_BYTES), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: no weight_map")
    if not isinstance(index.get("metadata"), dict):
        raise InputError(f'{path}: no metadata, without which transformers does not load it; add "metadata": {{}}')
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", file_name):
            raise InputError(f"{path}: tensor {name!r} is in {file_name!r}, which is not a file of this folder")
    return index


def _check_dtype(folder: Path, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Raises InputError for a dtype of the index, which transformers goes by where the config names none, in which no
    model is loaded.
    """
    named = config.get("dtype", config.get("torch_dtype")) is not None
    if not named and "dtype" in metadata and metadata["dtype"] not in LOADED_IN:
        raise InputError(
            f"{folder / INDEX_FILE}: metadata says that dtype is {metadata['dtype']!r}, in which no model is loaded; "
            "remove that entry"
        )


def index_shards(folder: Path) -> list[str]:
    """Returns the names of the files that the index in `folder` lists. InputError if it is not sound."""
    return sorted(set(_read_index(folder)["weight_map"].values()))


def _check_index(folder: Path, weight_map: dict[str, str], shards: tuple[Shard, ...]) -> None:
    held = {(name, shard.path.name) for shard in shards for name in shard.tensors}
    listed = set(weight_map.items())
    for name, file_name in sorted(listed - held):
        raise InputError(f"{folder / INDEX_FILE}: tensor {name!r} is not in {file_name}")
    for name, file_name in sorted(held - listed):
        raise InputError(f"{folder / file_name}: tensor {name!r} is not in the index there")
