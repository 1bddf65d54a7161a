"""Files that others wrote: opened without blocking, never through a link that leaves the folder, read within bounds."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

MAX_PARTS = 2**21
"""Commas, brackets and braces in a JSON text: 11 a tensor in a header. Each may cost 230 bytes of memory."""

MAX_DEPTH = 100
"""Levels of JSON. What can be read and is to be written again must not be at the limit of what Python can."""

ASCII_FROM_BYTES = 2**24
"""A text this long is taken only if it is ASCII: one other character makes all of them four bytes wide in memory."""

FOLDERS = ("additional_chat_templates", "qformer_tokenizer")
"""Inside a model folder, of which transformers opens files."""

SHOWN_CHARACTERS = 200
"""Of a foreign text in a line of output."""


def open_regular(folder: Path, name: str) -> int:
    """Returns a read-only descriptor of the regular file `name` in `folder`; never blocks, never follows a link
    elsewhere.

    A link may point inside the folder, or where the hub's cache keeps its files (snapshots/REVISION -> blobs).
    """
    path = folder / name
    real, home = _real(path), _real(folder)
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: leads outside the model folder, to {real}")
    return _open(real, path)


def open_given(path: Path) -> int:
    """Returns a read-only descriptor of the regular file that a user names, who may name a link; never blocks."""
    return _open(_real(path), path)


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise InputError(f"{path}: cannot be read (a link that leads nowhere)") from error
    except ValueError as error:  # a lone surrogate, or no character at all
        raise InputError(f"{str(path)!r}: not a name that a file can have") from error


def _open(real: Path, path: Path) -> int:
    """Returns the regular file `real`, which `path` leads to, opened for reading."""
    descriptor = None
    try:
        if stat.S_ISREG(real.lstat().st_mode):  # a device may do something on being opened
            descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if descriptor is not None:  # it was replaced meanwhile
        os.close(descriptor)
    raise InputError(f"{path}: not a regular file")


def is_folder(path: Path | str) -> bool:
    """Tells whether `path` is a folder. False for a name that the system does not take, where Path.is_dir raises
    OSError.
    """
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: Path | str) -> bool:
    """Tells whether `path` is a file, or a link to one. False as is_folder."""
    return os.path.isfile(path)  # noqa: PTH113


def entries(folder: Path) -> Iterator[Path]:
    """Returns everything at any depth of `folder` that is not a folder itself. Links are not followed, whatever they
    are to.
    """
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            found = list(os.scandir(place))
        except OSError as error:
            raise InputError(f"{place}: cannot be read ({error.strerror})") from error
        waiting += [place / entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
        yield from (place / entry.name for entry in found if not entry.is_dir(follow_symlinks=False))


def check_files(folder: Path, suffixes: tuple[str, ...]) -> None:
    """Raises InputError if a file of `folder` with such a name is a pipe, a device, or a link that leaves the folder.

    For those who hand the folder to a library that opens files by itself, some of them in FOLDERS.
    """
    for path in sorted([*folder.iterdir(), *(path for inner in FOLDERS for path in (folder / inner).glob("*"))]):
        if path.name.endswith(suffixes):
            os.close(open_regular(folder, str(path.relative_to(folder))))


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """Returns the bytes of `name` in `folder`. InputError if it is no regular file of the folder, or larger than
    `limit`.
    """
    return _read(open_regular(folder, name), folder / name, limit)


def read_given(path: Path, limit: int) -> bytes:
    """Returns the bytes of the file that a user names. InputError if it is no regular file, or larger than `limit`."""
    return _read(open_given(path), path, limit)


def _read(descriptor: int, path: Path, limit: int) -> bytes:
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if data is None or len(data) > limit:
        raise InputError(f"{path}: larger than {limit} bytes")
    return data


def printable(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Returns `text` for a line of output: what does not print is escaped, what is over `most` characters left out."""
    shown = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text[:most])
    return shown if len(text) <= most else f"{shown}..."


def check_name(name: str) -> None:
    """Raises InputError if `name`, which files are to mention, is not UTF-8: the name of a folder may be of any
    bytes.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{printable(name)}: this name is not UTF-8; rename the folder") from error


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object in `text`, UTF-8, no key twice. InputError that begins with `where` otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key appears twice")
        return table

    if sum(text.count(part) for part in (b",", b"{", b"[")) > MAX_PARTS:
        raise InputError(f"{where}: not sound JSON (over {MAX_PARTS} values)")
    if len(text) > ASCII_FROM_BYTES and not text.isascii():
        raise InputError(f"{where}: not sound JSON (over {ASCII_FROM_BYTES} bytes, and not all of them ASCII)")
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not sound JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: not a JSON object")
    if _deeper(parsed, MAX_DEPTH):
        raise InputError(f"{where}: not sound JSON (over {MAX_DEPTH} levels deep)")
    return parsed


def nested_values(value: Any) -> Iterator[Any]:
    """Returns `value` and everything in it, at any depth."""
    waiting = [value]
    while waiting:
        held = waiting.pop()
        yield held
        waiting += held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()


def _deeper(value: Any, depth: int) -> bool:
    """Tells whether `value` holds anything more than `depth` levels down."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for container in level
            if isinstance(container, dict | list)
            for inner in (container.values() if isinstance(container, dict) else container)
        ]
    return bool(level)
