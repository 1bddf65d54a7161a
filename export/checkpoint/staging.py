"""The output folder: claimed by one run at a time, filled under another name, published whole or not at all.

A run fills `.NAME.guardfold-partial` beside the output and holds a lock on it, which the system releases when the run
ends in whatever way. So a partial folder without a lock is what a dead run left, and the next run takes it over.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ...guard.base.errors import InputError
from ...guard.base.untrusted import check_name

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
    _check_name(output)
    _check_replaceable(output, overwrite)
    partial, aside = (output.with_name(f".{output.name}.guardfold-{what}") for what in ("partial", "replaced"))
    with _parents_of(output):
        lock = _claim(partial, output)
        try:
            _clean_up(partial, aside, output)
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            _check_replaceable(output, overwrite)
            with _undisturbed():
                _publish(partial, aside, output)
        except OSError as error:
            where = error.filename or output
            raise InputError(f"{where}: {error.strerror or error}; nothing was written to {output}") from error
        finally:
            with _undisturbed(), suppress(OSError):
                if _is(lock, partial):
                    _remove(partial)
            os.close(lock)


def check_room(folder: Path, needed: int) -> None:
    """Raises InputError unless the disk that holds `folder` has `needed` bytes, and some to spare."""
    free = shutil.disk_usage(folder).free
    if needed + ROOM_TO_SPARE > free:
        raise InputError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; "
            "make room or choose another --output"
        )


def _check_name(output: Path) -> None:
    if output.name in ("", ".."):
        raise InputError(f"--output {output}: has no name of its own; give the folder that is to be made")
    check_name(str(output))


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise InputError(f"{output}: exists and is not a folder")
    if any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputError(f"{output}: holds no {MANIFEST}, so guardfold did not write it and does not replace it")


@contextmanager
def _parents_of(output: Path) -> Iterator[None]:
    """The folder that `output` goes to. What was made for it, and is empty when the block ends, is removed."""
    new = [folder for folder in output.parents if not os.path.lexists(folder)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{output.parent}: cannot be written to ({error.strerror})") from error
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def _claim(partial: Path, output: Path) -> int:
    """Returns a descriptor that holds the lock of the folder `partial`, made if it is not there."""
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
        except OSError as error:
            os.close(lock)
            with suppress(OSError):
                partial.rmdir()
            raise InputError(
                f"{output.parent}: cannot be locked ({error.strerror}); choose another --output"
            ) from error
        if _is(lock, partial):
            return lock
        os.close(lock)


def _is(descriptor: int, path: Path) -> bool:
    """Tells whether `path` is what `descriptor` was opened on: not renamed, removed or made anew since."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _clean_up(partial: Path, aside: Path, output: Path) -> None:
    """Removes what a dead run left, and puts back the folder that it was about to replace."""
    partial.chmod(partial.stat().st_mode | stat.S_IRWXU)
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        else:
            path.unlink()
    if aside.is_symlink() or not aside.is_dir():
        aside.unlink(missing_ok=True)
    elif os.path.lexists(output):
        _remove(aside)
    else:
        aside.rename(output)


def _remove(folder: Path) -> None:
    """Removes the folder, whatever in it is read-only."""
    try:
        shutil.rmtree(folder)
    except PermissionError:
        folder.chmod(stat.S_IRWXU)
        for where, names, _ in os.walk(folder):
            for inner in (Path(where, name) for name in names):
                if not inner.is_symlink():
                    inner.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(partial: Path, aside: Path, output: Path) -> None:
    """Gives `partial` the name `output`, in one step where the system can exchange names; OSError if it did not."""
    if not output.exists():
        partial.rename(output)
        with suppress(OSError):
            _sync(output.parent)
        return
    replaced = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(replaced, fcntl.LOCK_EX)  # so that no other run takes it for what a dead one left
        if not _exchange(partial, output):
            output.rename(aside)
            try:
                partial.rename(output)
            except OSError:
                aside.rename(output)
                raise
        with suppress(OSError):
            _sync(output.parent)
        for path in (partial, aside):
            with suppress(OSError):
                _remove(path)
    finally:
        os.close(replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return bool(renameat2 and renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block has ended. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda *interrupt: waiting.append(interrupt))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])
