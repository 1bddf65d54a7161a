"""The manifest, guardfold.json: what the files of a guarded folder are, their hashes, and what was measured of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...guard.base.errors import InputError
from ...guard.base.untrusted import entries, open_regular, parse_object, printable, read_bytes
from ...guard.guard import Guard
from ...guard.model.generation import asks_for
from ..checkpoint.rounding import Rounding
from ..checkpoint.staging import MANIFEST
from ..source import Source

MAX_MANIFEST_BYTES = 64 * 2**20
NOT_READ = "not read"
"""In place of a hash."""

GUARD_FILE = Path("guardfold") / "guard.safetensors"
"""In a folder of its own: some runtimes load every safetensors file that lies beside the weights."""

NEEDED = {"files": dict, "verdict": str, "verified": bool}
"""What no manifest is without, and of what kind."""

ENTRY_TYPES = {**NEEDED, "source": dict, "figures": dict}
"""Of what kind the parts are that are used, where there are any."""


def file_hashes(folder: Path) -> dict[str, str]:
    """Path inside `folder` -> SHA-256, for every file but the manifest itself; NOT_READ for what is no regular file, or
    a link that leaves the folder.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in entries(folder))
    return {name: _file_hash(folder, name) for name in names if name != MANIFEST}


def _file_hash(folder: Path, name: str) -> str:
    try:
        descriptor = open_regular(folder, name)
    except InputError:
        return NOT_READ
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    folder: Path,
    source: Source,
    guard: Guard,
    rounding: Rounding,
    ruling: str,
    verified: bool,
    evidence: Any,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Writes guardfold.json: what these files are, where they came from, and everything that was measured of them.

    evidence: its figures.  entries: what the format that holds the guard says of itself.
    """
    manifest = {
        "guardfold": __version__,
        "verdict": ruling,
        "verified": verified,
        "status": _status(verified),
        **(entries or {}),
        "source": source.describe(),
        "guard": {
            "sha256": guard.hash,
            "interventions": guard.describe(),
            "provenance": dict(guard.provenance),
        },
        "rounding": rounding,
        "decoding": {"measured": "greedy", "not_applied": asks_for(source.folder)},
        "files": file_hashes(folder),
        "figures": evidence,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def extend_manifest(folder: Path, manifest: Mapping[str, Any], verified: bool, figures: Mapping[str, Any]) -> None:
    """Writes `manifest` into `folder` with more figures, and the hashes of what lies there now."""
    changed = {
        **manifest,
        "verified": verified,
        "status": _status(verified),
        "files": file_hashes(folder),
        "figures": {**manifest["figures"], **figures},
    }
    (folder / MANIFEST).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")


def _status(verified: bool) -> str:
    return "VERIFIED" if verified else "NOT VERIFIED"


def load_manifest(folder: Path, *more: str) -> dict[str, Any]:
    """Reads guardfold.json of `folder`: at least `files` (path -> SHA-256), `verdict`, `verified`, and what `more`
    names. InputError otherwise.
    """
    path, needed = folder / MANIFEST, (*NEEDED, *more)
    if not os.path.lexists(path):
        raise InputError(f"{folder}: no {MANIFEST}; give a folder or a hub id that `guardfold export` made")
    manifest = parse_object(read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES), str(path))
    for name in needed:
        if name not in manifest:
            raise InputError(f"{path}: not a manifest that guardfold wrote (it needs {', '.join(needed)})")
    for name, kind in ENTRY_TYPES.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise InputError(
                f"{path}: not a manifest that guardfold wrote (its {name} is a {type(manifest[name]).__name__})"
            )
    if printable(manifest["verdict"]) != manifest["verdict"]:
        raise InputError(f"{path}: not a manifest that guardfold wrote (verdict {printable(manifest['verdict'])})")
    return manifest


def written_rounding(folder: Path) -> Rounding:
    """Reads how the weights in `folder` were rounded off its manifest; to nearest where it has none or says nothing.

    Raises InputError if there is a manifest that is not sound.
    """
    if not (folder / MANIFEST).exists():
        return "nearest"
    manifest = parse_object(read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES), str(folder / MANIFEST))
    return "repair" if manifest.get("rounding") == "repair" else "nearest"
