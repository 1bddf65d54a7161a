"""Headers and indices bent at random: a typed error or a checkpoint that reads as it should, and nothing else.

Run by `pytest -m fuzz`, for a minute, or for GUARDFOLD_FUZZ_SECONDS. In a process of its own, so that memory counts.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import containers
import pytest
from containers import GOOD, container, entries, entry, folder_with, json_values
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from guardfold.export.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Checkpoint
from guardfold.guard.base.errors import InputError

ROUND = 300
"""Examples between two looks at the clock."""

MEMORY_BYTES = 2**30

NUMBERS = st.sampled_from([-(2**63), -1, 0, 1, 4, 8, 24, 32, 40, 2**31, 2**32, 2**47, 2**48, 2**63, 2**64, 1.5, True])
NAMES = st.sampled_from(["a", "b", "c", "../a", "a\n", "__metadata__", "", "\ud800", "a" * 9999])
FILES = st.sampled_from(["one.safetensors", "two.safetensors", "../one.safetensors", "/etc/passwd", "three", "", "."])
numbered = st.builds(
    entry, st.sampled_from(["F32", "BF16", "I64", "F9"]), st.lists(NUMBERS, max_size=9), NUMBERS, NUMBERS
)
headers = st.dictionaries(NAMES, numbered | entries | json_values, max_size=5) | st.builds(
    lambda name, change: {**GOOD, name: change}, NAMES, numbered | json_values
)
prefixes = st.none() | st.sampled_from([0, 1, 8, 100, 2**20, 100 * 2**20, 100 * 2**20 + 1, 2**63, 2**64 - 1])
indices = st.dictionaries(
    st.sampled_from(["weight_map", "metadata", "more"]),
    st.dictionaries(NAMES, FILES | json_values, max_size=5) | json_values,
    max_size=3,
)


@st.composite
def bent(draw: st.DrawFn, sound: bytes) -> bytes:
    """`sound` with bytes changed, doubled, left out and cut off."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 8))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        action = draw(st.sampled_from(["change", "double", "drop", "cut"]))
        if action == "change" and data:
            data[place] = draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0-9e\\')))
        elif action == "double":
            data[place:place] = data[place : place + draw(st.integers(1, 40))]
        elif action == "drop":
            del data[place : place + draw(st.integers(1, 40))]
        elif action == "cut" and draw(st.booleans()):
            del data[place:]
    return bytes(data)


def sound_or_refused(folder: Path) -> None:
    """Opens `folder` and reads all of it; an InputError of one line that names the folder is the only error."""
    said = ""
    try:
        checkpoint = Checkpoint.open(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except InputError as error:
        said = str(error)
    if said:
        assert str(folder) in said and "\n" not in said, said
        return
    held = {shard.path: shard.data_start for shard in checkpoint.shards}
    for shard, info in checkpoint.tensors.values():
        held[shard.path] += info.end - info.begin
    assert all(path.stat().st_size == size for path, size in held.items())


@contextmanager
def opened_files() -> Iterator[set[str]]:
    """Collects the names of the files that are opened while the block runs."""
    names: set[str] = set()
    active = [True]

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if active[0] and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            names.add(os.fspath(arguments[0]) if not isinstance(arguments[0], bytes) else arguments[0].decode())

    sys.addaudithook(note)
    try:
        yield names
    finally:
        active[0] = False


def fuzz(seconds: float) -> int:
    """Examples tried in `seconds`; a failing one raises what hypothesis says of it."""
    tried, end = 0, time.monotonic() + seconds
    common = settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    with tempfile.TemporaryDirectory() as scratch, opened_files() as opened:
        home = folder_with(Path(scratch) / "model")
        bait = home.parent / "one.safetensors"  # where ../one.safetensors leads; never opened
        bait.symlink_to(home / "config.json")
        index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}).encode()
        while time.monotonic() < end:

            @seed(tried)
            @common
            @given(header=headers, size=st.integers(0, 60), length=prefixes)
            def any_header(header: Any, size: int, length: int | None) -> None:
                sound_or_refused(folder_with(home, container(json.dumps(header).encode(), size, length)))

            @seed(tried)
            @common
            @given(data=bent(container(GOOD)))
            def any_damage(data: bytes) -> None:
                sound_or_refused(folder_with(home, data))

            @seed(tried)
            @common
            @given(index=indices.map(lambda each: json.dumps(each).encode()) | bent(index), shard=bent(container(GOOD)))
            def any_index(index: bytes, shard: bytes) -> None:
                (home / SINGLE_FILE).unlink(missing_ok=True)
                (home / INDEX_FILE).write_bytes(index)
                (home / "one.safetensors").write_bytes(container(GOOD))
                (home / "two.safetensors").write_bytes(shard)
                sound_or_refused(home)

            for test in (any_header, any_damage, any_index):
                test()
                tried += ROUND
            for name in (INDEX_FILE, "one.safetensors", "two.safetensors"):
                (home / name).unlink()
        outside = {name for name in opened if not Path(name).is_relative_to(home) and "safetensors" in name}
        assert outside == set(), outside
    return tried


@pytest.mark.fuzz
def test_no_header_and_no_index_leads_outside_or_to_anything_but_the_typed_error() -> None:
    seconds = os.environ.get("GUARDFOLD_FUZZ_SECONDS", "60")
    path = os.pathsep.join([str(Path(containers.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, seconds],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


if __name__ == "__main__":
    count = fuzz(float(sys.argv[1]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{count} examples, peak {peak >> 20} MB")
    assert peak < MEMORY_BYTES, f"{peak >> 20} MB"
