"""The output folder: claimed by one run at a time, filled under another name, published whole or not at all.

A run fills `.NAME.guardfold-partial` beside the output and holds a lock on it, which the system releases when the run
ends in whatever way. So a partial folder without a lock is what a dead run left, and the next run takes it over.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..guard.errors import InputError

MANIFEST = "guardfold.json"
"""What a folder that guardfold wrote holds: the only kind that --overwrite replaces."""

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of renameat2(2)."""

ROOM_TO_SPARE = 64 * 2**20
"""For what goes beside the weights: tokenizer, report, the guard."""


@contextmanager
def staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `output` that becomes `output` when the block ends well, and vanishes when it does not.

    Raises InputError if `output` exists and may not be replaced, another run is writing it, or the disk does not take
    it.
    """
    _check_replaceable(output, overwrite)
    partial, aside = (output.with_name(f".{output.name}.guardfold-{what}") for what in ("partial", "replaced"))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _claim(partial, output)
    except OSError as error:
        raise InputError(f"{output.parent}: cannot be written to ({error.strerror})") from error
    try:
        _clean_up(partial, aside, output)
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        _check_replaceable(output, overwrite)
        _publish(partial, aside, output)
    except OSError as error:
        where = error.filename or output
        raise InputError(f"{where}: {error.strerror or error}; nothing was written to {output}") from error
    finally:
        if _is(lock, partial):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def check_room(folder: Path, needed: int) -> None:
    """InputError unless the disk that holds `folder` has `needed` bytes, and some to spare."""
    free = shutil.disk_usage(folder).free
    if needed + ROOM_TO_SPARE > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "make room or choose another --output"
        )


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder")
    if any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputError(f"{output}: holds no {MANIFEST}, so guardfold did not write it and does not replace it")


def _claim(partial: Path, output: Path) -> int:
    """A descriptor that holds the lock of the folder `partial`, made if it is not there."""
    while True:
        with suppress(FileExistsError):
            partial.mkdir(mode=0o755)
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its run ended between the two lines
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise InputError(f"{output}: another run is writing it; wait for it or choose another --output") from error
        if _is(lock, partial):
            return lock
        os.close(lock)


def _is(descriptor: int, path: Path) -> bool:
    """Whether `path` is what `descriptor` was opened on: not renamed, removed or made anew since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _clean_up(partial: Path, aside: Path, output: Path) -> None:
    """Removes what a dead run left, and puts back the folder that it was about to replace."""
    for each in partial.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()
    partial.chmod(0o755)
    if aside.is_dir() and not os.path.lexists(output):
        aside.rename(output)
    elif aside.is_dir():
        shutil.rmtree(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, aside: Path, output: Path) -> None:
    """Gives `partial` the name `output`, in one step where the system can exchange names."""
    if not output.exists():
        partial.rename(output)
        _sync(output.parent)
        return
    replaced = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(replaced, fcntl.LOCK_EX)  # so that no other run takes it for what a dead one left
        if not _exchange(partial, output):
            output.rename(aside)
            partial.rename(output)
        _sync(output.parent)
        for each in (partial, aside):
            shutil.rmtree(each, ignore_errors=True)
    finally:
        os.close(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
