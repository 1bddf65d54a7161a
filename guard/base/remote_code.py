"""Code that comes with a model (auto_map): run only if the user asks for it, and only what lies in the folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import InputError
from .untrusted import nested_values, parse_object, read_bytes

CONFIG_FILES = (
    *("config.json", "tokenizer_config.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
"""Where transformers looks for the names of code."""

AUDIO = "audio_tokenizer"
"""What a processor calls a model that lies elsewhere, and that transformers would load from there."""

IMPLEMENTATION = "_implementation"
"""End of a key that says how attention or experts are computed; a repository's name makes transformers fetch a kernel.
"""

MAX_CONFIG_BYTES = 16 * 2**20
MAX_CODE_BYTES = 16 * 2**20
CODE_REFERENCE = re.compile(r"([\w\-]+)\.\w+")
"""module.Class, the module lying in the folder itself: transformers follows no others."""

GENERATE = Path("custom_generate")
"""A folder whose code would take the place of `generate`."""

Params = ParamSpec("Params")
Result = TypeVar("Result")

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def trusted() -> bool:
    """Tells whether the code that comes with a model may be run now, in this thread."""
    return _trusted.get()


@contextmanager
def trusting(allowed: bool) -> Iterator[None]:
    """While the block runs, the code that comes with models may be run or not. Threads do not inherit this: in those
    started meanwhile it may not.
    """
    token = _trusted.set(allowed)
    try:
        yield
    finally:
        _trusted.reset(token)


def trusting_if_asked(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """Returns `function`, during whose calls a model's own code may be run if their keyword trust_remote_code
    says so.
    """

    @wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        with trusting(kwargs.get("trust_remote_code") is True):
            return function(*args, **kwargs)

    return call


def code_of(folder: Path) -> dict[str, list[str]]:
    """Config file of `folder` -> what it names of code (auto_map, at any depth); only files that have such entries."""
    found = {}
    for name in _config_files(folder):
        if os.path.lexists(folder / name):
            entries = [table["auto_map"] for table in _objects(folder, name) if "auto_map" in table]
            if entries:
                found[name] = [text for text in nested_values(entries) if isinstance(text, str)]
    return found


def _config_files(folder: Path) -> Iterator[str]:
    """With trust, also those of a processor's further tokenizers, which lie in folders of their own."""
    yield from CONFIG_FILES
    for path in sorted(folder.glob("*/tokenizer_config.json")) if trusted() else ():
        yield from (f"{path.parent.name}/{name}" for name in ("config.json", path.name))


def _objects(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Returns the object in the JSON file `name` of `folder` and every object in it."""
    held = parse_object(read_bytes(folder, name, MAX_CONFIG_BYTES), str(folder / name))
    return (table for table in nested_values(held) if isinstance(table, dict))


def check_code(folder: Path) -> None:
    """Raises InputError if a config file of `folder` names code that is not trusted, or anything not in the folder
    itself.
    """
    _refuse_audio(folder)
    _refuse_kernels(folder)
    named = code_of(folder)
    if not trusted():
        for name in named:
            raise InputError(
                f"{folder / name}: names code of its own (auto_map), which is not run unless you ask for it; read the "
                "code and pass --trust-remote-code, or remove the entry if transformers knows the model without it"
            )
        return
    if os.path.lexists(folder / GENERATE):
        raise InputError(f"{folder / GENERATE}: generates by code of its own, which is not supported; remove it")
    for path in sorted(folder.glob("*.py")):
        read_bytes(folder, path.name, MAX_CODE_BYTES)
    for name, references in named.items():
        for reference in references:
            _check_reference(folder, folder / name, reference)


def _refuse_audio(folder: Path) -> None:
    processor, own = "processor_config.json", f"{AUDIO}_config.json"
    named = os.path.lexists(folder / processor) and any(AUDIO in table for table in _objects(folder, processor))
    if named or os.path.lexists(folder / own):
        where = folder / (processor if named else own)
        raise InputError(
            f"{where}: names a model outside the folder ({AUDIO}), which is never loaded; remove the entry"
        )


def _refuse_kernels(folder: Path) -> None:
    for name in filter(lambda file: os.path.lexists(folder / file), _config_files(folder)):
        for key, value in (item for table in _objects(folder, name) for item in table.items()):
            repository = next((text for text in nested_values(value) if isinstance(text, str) and "/" in text), None)
            if key.endswith(IMPLEMENTATION) and repository:
                raise InputError(
                    f"{folder / name}: {key} names code on the hub ({repository}), which is never fetched; remove it"
                )


def _check_reference(folder: Path, where: Path, reference: str) -> None:
    if "--" in reference:
        raise InputError(
            f"{where}: auto_map names code of another repository ({reference}), which is never run, because nothing "
            "says at which commit; put its modules into the folder and name them without the repository"
        )
    match = CODE_REFERENCE.fullmatch(reference)
    if match is None:
        raise InputError(f"{where}: auto_map names {reference!r}, which is no module.Class of the folder")
    if not (folder / f"{match[1]}.py").is_file():
        raise InputError(f"{where}: auto_map names {reference}, but the folder has no {match[1]}.py")
