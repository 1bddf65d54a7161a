"""Bytes from file to file: threads that share the work, and what they leave in the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from crash import model_and_guard
from zoo import change_tensors, tensors

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.checkpoint.transfer import drop_from_cache, in_page_cache, in_threads
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard

PAGE, MEGABYTE = mmap.PAGESIZE, 2**20


def resident(path: Path) -> int:
    """Bytes of `path` that are in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // PAGE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        del start
        assert not failed
        return PAGE * sum(page & 1 for page in pages)


def to_disk(path: Path) -> None:
    """All of `path` leaves the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        drop_from_cache(file.fileno(), 0, path.stat().st_size)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `model`, 32 MB of which no guard touches, and `guard.safetensors`."""
    model, _ = model_and_guard(tmp_path, "5GB")
    change_tensors(model, lambda held: held.update(rest=torch.arange(2**23, dtype=torch.float32)))
    to_disk(model / "model.safetensors")
    if resident(model / "model.safetensors"):
        pytest.skip("this filesystem lives in the page cache")
    return tmp_path


def rewritten(place: Path) -> Path:
    checkpoint = Checkpoint.open(place / "model")
    family = family_of(checkpoint)
    edits = fold(Guard.load(place / "guard.safetensors"), family, checkpoint.shapes)
    (place / "out").mkdir()
    rewrite(checkpoint, family, edits, place / "out", lambda _: None)
    return place / "out" / "model.safetensors"


def test_a_file_that_is_not_in_the_page_cache_passes_through_it(place: Path) -> None:
    out = rewritten(place)
    assert resident(out) == 0
    assert resident(place / "model" / "model.safetensors") < 8 * MEGABYTE  # what is read ahead of its header
    assert tensors(place / "out")["rest"].equal(torch.arange(2**23, dtype=torch.float32))


def test_one_that_is_there_stays_with_what_is_written_of_it(place: Path) -> None:
    source = place / "model" / "model.safetensors"
    source.read_bytes()
    out = rewritten(place)
    assert resident(source) >= source.stat().st_size
    assert resident(out) >= out.stat().st_size


def test_samples_tell_whether_a_file_is_in_the_page_cache(place: Path) -> None:
    source = place / "model" / "model.safetensors"
    with source.open("rb") as file:
        assert not in_page_cache(file.fileno())
        to_disk(source)
        file.read(MEGABYTE)
        assert not in_page_cache(file.fileno())
        file.read()
        assert in_page_cache(file.fileno())


def test_where_the_system_does_not_say_files_count_as_cached(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    with (place / "model" / "model.safetensors").open("rb") as file:
        monkeypatch.setattr(os, "preadv", fails)
        assert in_page_cache(file.fileno())


def test_threads_stop_at_the_first_failure_and_say_what_it_was() -> None:
    done: list[int] = []

    def task(number: int) -> Callable[[], None]:
        def work() -> None:
            if number == 3:
                raise InputError("the third")
            done.append(number)

        return work

    with pytest.raises(InputError, match="the third"):
        in_threads([[task(number) for number in range(1000)]], 1)
    assert done == [0, 1, 2]
    done.clear()
    in_threads([[task(number) for number in range(first, 500, 3)] for first in (10, 11, 12)], 4)
    assert sorted(done) == list(range(10, 500))


def test_two_threads_write_two_files_as_long_as_there_are_two() -> None:
    at_work: list[str] = []
    together: list[list[str]] = []

    def task(file: str) -> None:
        at_work.append(file)
        together.append(sorted(at_work))
        time.sleep(0.01)
        at_work.remove(file)

    in_threads([[partial(task, file)] * 5 for file in "abc"], 2)
    both = [files for files in together if len(files) == 2]
    assert len(both) >= 10
    assert sum(one == other for one, other in both) <= 1
