"""What a guarded model was made from, as its papers name it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..guard.base.untrusted import check_name


@dataclass(frozen=True)
class Source:
    """What the guarded model was made from: its name, its folder, and the hub commit where it came from one."""

    name: str
    folder: Path
    adapter: Mapping[str, Any] | None = None
    """The adapter that was merged first: its name, hub commit and hash."""

    def __post_init__(self) -> None:
        check_name(self.name)

    def describe(self) -> dict[str, Any]:
        """Returns what the manifest says of it."""
        merged = {"adapter": dict(self.adapter)} if self.adapter else {}
        return {"model": self.name, "revision": self.revision, **merged}

    @property
    def title(self) -> str:
        return f"{self.name} with {self.adapter['name']}" if self.adapter else self.name

    @property
    def revision(self) -> str | None:
        resolved = self.folder.resolve()
        return resolved.name if resolved.parent.name == "snapshots" else None
