"""Are these the files that were measured? A folder's bytes against the hashes in its guardfold.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..guard.errors import InputError
from ..guard.hub import download_everything, is_hub_id, split_revision
from .card import MANIFEST, file_hashes

MAX_MANIFEST_BYTES = 64 * 2**20
NOT_OURS = (".git", ".cache")
"""Folders that git and huggingface_hub keep in a checkout or a download."""

ATTRIBUTES = ".gitattributes"
"""What the hub itself puts into every repository."""


@dataclass(frozen=True)
class Verification:
    """What was compared: the folder (of a hub id, its snapshot), its manifest, and every difference, a line each."""

    folder: Path
    manifest: dict[str, Any]
    differences: list[str]

    def __str__(self) -> str:
        """What a verified folder is, in a line."""
        source = self.manifest.get("source", {})
        commit = f" at commit {source['revision']}" if source.get("revision") else ""
        standing = "VERIFIED" if self.manifest["verified"] else "NOT VERIFIED"
        return (
            f"all {len(self.manifest['files'])} files are the ones that were measured; made from "
            f"{source.get('model', 'unknown')}{commit}; verdict: {self.manifest['verdict']} ({standing})"
        )


def verify(name: str) -> Verification:
    """Compares a folder, or a hub id (@REVISION) downloaded at its commit, with its own guardfold.json.

    Raises InputError if there is no such folder, repository or manifest. The manifest itself is not signed: this says
    whether the files are those it speaks of, not who wrote it.
    """
    folder = Path(name)
    if not folder.is_dir():
        hub_id, revision = split_revision(name)
        if not is_hub_id(hub_id):
            raise InputError(f"{name}: no such folder; give one, or a hub id (owner/name)")
        folder = download_everything(hub_id, revision)
    manifest = load_manifest(folder)
    return Verification(folder, manifest, differences(folder, manifest))


def load_manifest(folder: Path) -> dict[str, Any]:
    """guardfold.json of `folder`: at least `files` (path -> SHA-256), `verdict`, `verified`. InputError otherwise."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}; give a folder or a hub id that `guardfold export` made")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise InputError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    kinds = {"files": dict, "verdict": str, "verified": bool}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{path}: not a manifest that guardfold wrote (it needs files, verdict and verified)")
    return manifest


def differences(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """What is not as it was measured, a line each: files that differ, are missing, or were added."""
    recorded, found = manifest["files"], file_hashes(folder)
    added = {path for path in found.keys() - recorded.keys() if not _foreign(path)}
    return [
        *(f"{path}: missing" for path in sorted(recorded.keys() - found.keys())),
        *(f"{path}: differs" for path in sorted(recorded.keys() & found.keys()) if recorded[path] != found[path]),
        *(f"{path}: added; it was never measured" for path in sorted(added)),
    ]


def _foreign(path: str) -> bool:
    return path == ATTRIBUTES or path.partition("/")[0] in NOT_OURS
