"""Bytes from file to file, and threads that share such work."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...guard.base.errors import InputError

COPY_BYTES = 64 * 2**20
"""Asked of the kernel at a time."""

THROUGH_MEMORY_BYTES = 4 * 2**20
"""Copied through memory at a time, where the kernel cannot copy by itself."""

SAMPLES = 16
"""Places at which `in_page_cache` looks."""

FICLONE = 0x40049409
"""ioctl_ficlone(2): the target shares the source's blocks until either is written."""


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """The open file, closed when the block ends."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reflink(source: int, target: int) -> None:
    """Makes the empty file `target` share the blocks of `source`; OSError where the filesystem cannot."""
    fcntl.ioctl(target, FICLONE, source)


def copy_range(source: int, target: int, begin: int, end: int, to: int, path: Path) -> None:
    """Copies bytes begin:end of `source`, which lies at `path`, to offset `to`; within the kernel where it can.

    Raises InputError if the source ends first, OSError as the disk does.
    """
    ways = [_copy_in_kernel, _send, _copy_through_memory]
    done, size = 0, end - begin
    while done < size:
        try:
            count = ways[0](source, target, begin + done, to + done, min(COPY_BYTES, size - done))
        except OSError:
            if len(ways) == 1:
                raise
            count = 0
        if count == 0 and len(ways) == 1:
            raise InputError(f"{path}: ends at byte {begin + done}; it was cut short while being read")
        if count == 0:
            del ways[0]
        done += count


def _copy_in_kernel(source: int, target: int, begin: int, to: int, count: int) -> int:
    return os.copy_file_range(source, target, count, begin, to)


def _send(source: int, target: int, begin: int, to: int, count: int) -> int:
    os.lseek(target, to, os.SEEK_SET)
    return os.sendfile(target, source, begin, count)


def _copy_through_memory(source: int, target: int, begin: int, to: int, count: int) -> int:
    return write_exactly(target, os.pread(source, min(count, THROUGH_MEMORY_BYTES), begin), to)


def write_exactly(target: int, data: Any, offset: int) -> int:
    """Writes all of the buffer `data` at `offset`; returns its size in bytes."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        done += os.pwrite(target, view[done:], offset + done)
    return done


def write_runs(target: int, rows: torch.Tensor, runs: Sequence[tuple[int, int, int]], row_bytes: int, to: int) -> None:
    """Writes rows of the tensor at offset `to`: of each (first, last, place) in `runs` first:last, which stand in
    `rows` from `place` on.
    """
    array: Any = rows.contiguous().view(torch.uint8).numpy()
    data = memoryview(array).cast("B")
    for first, last, place in runs:
        write_exactly(target, data[place * row_bytes : (place + last - first) * row_bytes], to + first * row_bytes)


def in_page_cache(descriptor: int) -> bool:
    """Tells whether the page cache holds the file, as far as samples tell; also where the system does not say."""
    size, byte = os.fstat(descriptor).st_size, bytearray(1)
    try:
        for number in range(SAMPLES):
            os.preadv(descriptor, [byte], size * number // SAMPLES, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def drop_from_cache(descriptor: int, begin: int, end: int) -> None:
    """Bytes begin:end leave the page cache; those not yet on the disk begin to be written, and stay until then."""
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads of our own share the work; torch's would wait for one another, ten times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(queues: Sequence[Sequence[Callable[[], None]]], jobs: int) -> None:
    """Runs the tasks of `queues` in `jobs` threads, those of a queue begun in their order. Raises what the first
    failing one raised; others stop.

    A thread takes from the queue that the fewest are at, of those the longest, for a queue writes one file, and a file
    takes one write at a time: two threads that copied into the same one were slower than one alone (measured on ext4).
    """
    waiting, at_work = [list(reversed(queue)) for queue in queues], [0] * len(queues)
    lock, stop = threading.Lock(), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                left = [(at_work[number], -len(tasks), number) for number, tasks in enumerate(waiting) if tasks]
                if not left:
                    return
                *_, queue = min(left)
                task = waiting[queue].pop()
                at_work[queue] += 1
            try:
                task()
            except BaseException as error:
                failures.append(error)
                stop.set()
            with lock:
                at_work[queue] -= 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, jobs))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if failures:
        raise failures[0]
