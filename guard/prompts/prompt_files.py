"""Files of prompts that others wrote, row by row: read within bounds, every complaint with its file and line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..base.errors import InputError
from ..base.untrusted import open_given, parse_object

MAX_ROW_BYTES = 2**16
MAX_FILE_BYTES = 256 * 2**20
MAX_ROWS = 100_000
MAX_LINES = 2**22
"""Blank ones too, and those within a row of CSV."""

MAX_TEXT = 2**14
"""Characters of one text: what a model takes for a text grows with its square."""

Item = TypeVar("Item")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Returns (line number, row) of a JSONL or CSV file. InputError, naming the line, for what is not a row."""
    found = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    yield from limited(path, found)


def limited(path: Path, found: Iterable[tuple[int, Item]]) -> Iterator[tuple[int, Item]]:
    """Returns `found`, (line number, what is there) of the file `path`. InputError if there are more than a file may
    have.
    """
    for count, (number, item) in enumerate(found, start=1):
        if count > MAX_ROWS:
            raise InputError(f"{path}, line {number}: over {MAX_ROWS} rows; leave some out")
        yield number, item


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines(path):
        if line.strip():
            yield number, parse_object(line.encode(), f"{path}, line {number}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Returns rows of a CSV file. A row may go over several lines, together no longer than one may be."""
    taken = 0

    def counted() -> Iterator[str]:
        nonlocal taken
        for number, line in lines(path):
            taken += len(line)
            _check_length(taken, MAX_ROW_BYTES, f"{path}, line {number}")
            yield line

    reader = csv.DictReader(counted())
    try:
        for row in reader:
            yield reader.line_num, row
            taken = 0
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Returns (line number, line) of a text file, none of them read further than one may be long. InputError
    otherwise.
    """
    descriptor = open_given(path)
    with os.fdopen(descriptor, encoding="utf-8-sig", newline="") as file:  # spreadsheets begin their CSV with a mark
        if os.fstat(descriptor).st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        try:
            for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), ""), start=1):
                _check_length(len(line), MAX_ROW_BYTES, f"{path}, line {number}")
                if number > MAX_LINES:
                    raise InputError(f"{path}: over {MAX_LINES} lines")
                yield number, line
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error})") from error


def field(path: Path, number: int, row: dict[str, Any], name: str) -> str:
    """Returns the text `row[name]`. InputError naming file, line and column if there is none, or none that a model is
    asked.
    """
    return text_of(row, name, f"{path}, line {number}")


def text_of(row: dict[str, Any], name: str, where: str) -> str:
    """Returns the text `row[name]`. InputError that begins with `where` if there is none, or none that a model is
    asked.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name!r} is missing or not text")
    return sound_text(value, f"{where}: {name!r}")


def sound_text(text: str, where: str) -> str:
    """Returns `text` without the blanks around it. InputError if it is too long to be asked, or is none in UTF-8."""
    text = text.strip()
    _check_length(len(text), MAX_TEXT, where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: not text ({error.reason})") from error
    return text


def _check_length(length: int, limit: int, where: str) -> None:
    if length > limit:
        raise InputError(f"{where}: longer than {limit} characters")
