"""guardfold extract: a guard alone, as a file."""

from __future__ import annotations

import os
from pathlib import Path

from ..guard.base.errors import InputError
from ..guard.base.remote_code import trusting_if_asked
from ..guard.base.untrusted import is_file, is_folder
from ..guard.guard import Guard
from ..guard.presets import presets
from ..validators.behaviour.making import GuardOptions, guard_of
from .sources import based_on, open_source


@trusting_if_asked
def extract_guard(model: str, options: GuardOptions | None = None, *, trust_remote_code: bool = False) -> Guard:
    """Returns the guard that `options` describe: read from a file, or made from `model` (demo, alias, hub id or
    folder).

    Raises InputError for a model or prompts that cannot be used, layers out of range, or a rank above the anchors, and
    Refused if no candidate is within the limits or the detector cannot tell harmful prompts apart.
    """
    options = options or GuardOptions()
    return guard_of(open_source(model, options.family), options)


@trusting_if_asked
def extract_to(
    output: Path,
    model: str,
    options: GuardOptions,
    *,
    overwrite: bool = False,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Guard:
    """Extracts a guard into the file `output`, from `model` or, with `adapter`, from `model` after merging it.

    Raises InputError if the file exists (without `overwrite`) or cannot be.
    """
    if os.path.lexists(output) and not (overwrite and is_file(output)):
        raise InputError(f"{output}: exists already; choose another --output or pass --overwrite")
    if not is_folder(output.parent):
        raise InputError(f"{output.parent}: no such folder")
    if options.guard not in presets():
        raise InputError(f"--guard {options.guard}: extraction takes a preset ({', '.join(presets())})")
    with based_on(open_source(model, options.family), adapter, output.parent) as base:
        guard = guard_of(base, options)
    guard.save(output)
    return guard
