"""Are these the files that were measured? A folder's bytes against the hashes in its guardfold.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...guard.base.errors import InputError
from ...guard.base.hub import download_everything, is_hub_id, split_revision
from ...guard.base.untrusted import is_folder, printable
from .manifest import NOT_READ, file_hashes, load_manifest

NOT_OURS = (".git", ".cache")
"""What git and huggingface_hub keep in a checkout, a download or an upload: folders; of a submodule, .git is a file."""

ATTRIBUTES = ".gitattributes"
"""What the hub itself puts into every repository."""


@dataclass(frozen=True)
class Verification:
    """What was compared: the folder (of a hub id, its snapshot), its manifest, and every difference, a line each."""

    folder: Path
    manifest: dict[str, Any]
    differences: list[str]

    def __str__(self) -> str:
        """Returns what a verified folder is, in a line."""
        source = self.manifest.get("source", {})
        commit = f" at commit {printable(str(source['revision']))}" if source.get("revision") else ""
        model = printable(str(source.get("model", "unknown")))
        standing = "VERIFIED" if self.manifest["verified"] else "NOT VERIFIED"
        return (
            f"all {len(self.manifest['files'])} files are the ones that were measured; made from "
            f"{model}{commit}; verdict: {self.manifest['verdict']} ({standing})"
        )


def verify(name: str) -> Verification:
    """Compares a folder, or a hub id (@REVISION) downloaded at its commit, with its own guardfold.json.

    Raises InputError if there is no such folder, repository or manifest. The manifest itself is not signed: this says
    whether the files are those it speaks of, not who wrote it.
    """
    folder = Path(name)
    if not is_folder(folder):
        hub_id, revision = split_revision(name)
        if not is_hub_id(hub_id):
            raise InputError(f"{name}: no such folder; give one, or a hub id (owner/name)")
        folder = download_everything(hub_id, revision)
    manifest = load_manifest(folder)
    return Verification(folder, manifest, differences(folder, manifest))


def differences(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Returns what is not as it was measured, a line each: files that differ, are missing, or were added."""
    recorded, found = manifest["files"], file_hashes(folder)
    both = sorted(recorded.keys() & found.keys())
    differ = [path for path in both if found[path] != NOT_READ and found[path] != recorded[path]]
    replaced = [path for path in both if found[path] == NOT_READ]
    added = sorted(path for path in found.keys() - recorded.keys() if not _foreign(path))
    return [
        *(f"{printable(path)}: missing" for path in sorted(recorded.keys() - found.keys())),
        *(f"{printable(path)}: differs" for path in differ),
        *(f"{printable(path)}: added in place of a file; it is none of this folder's own" for path in replaced),
        *(f"{printable(path)}: added; it was never measured" for path in added),
    ]


def _foreign(path: str) -> bool:
    return path == ATTRIBUTES or path.partition("/")[0] in NOT_OURS
