"""Files of safetensors made by hand, byte by byte: a sound one, and whatever header is to be tried."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from deadline import within
from hypothesis import strategies as st
from zoo import Tiny

from guardfold.export.checkpoint.headers import SINGLE_FILE, Checkpoint
from guardfold.guard.base.errors import InputError

CONFIG = json.dumps(Tiny().config().to_dict())
Entries = dict[str, Any]


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD: Entries = {
    "a": entry("F32", [2, 3], 0, 24),
    "b": entry("BF16", [4], 24, 32),
    "c": entry("I64", [], 32, 40),
    "d": entry("F16", [0, 5], 40, 40),
}


def container(header: Entries | bytes, size: int | None = None, length: int | None = None) -> bytes:
    """A safetensors file with this header; size: bytes of data (40 by default), length: what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(40 if size is None else size)


def folder_with(path: Path, shard: bytes | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(CONFIG)
    if shard is not None:
        (path / SINGLE_FILE).write_bytes(shard)
    return path


def refused(folder: Path, names: str, says: str = "") -> None:
    """That `folder` is refused, in one line that names the file `names`."""
    with within(20), pytest.raises(InputError, match=says) as error:
        Checkpoint.open(folder)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "U8", "F9"]) | json_values},
    optional={
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 50), min_size=1, max_size=3) | json_values,
        "more": json_values,
    },
)
