"""What goes with the weights: the manifest (guardfold.json) and the model card (README.md)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from .. import __version__
from ..guard.guard import Guard
from ..guard.untrusted import parse_object, read_bytes
from .rounding import Rounding
from .staging import MANIFEST

MAX_MANIFEST_BYTES = 64 * 2**20

GUARD_FILE = Path("guardfold") / "guard.safetensors"
"""In a folder of its own: some runtimes load every safetensors file that lies beside the weights."""


@dataclass(frozen=True)
class Source:
    """What the guarded model was made from: its name, its folder, and the hub commit where it came from one."""

    name: str
    folder: Path

    @property
    def revision(self) -> str | None:
        resolved = self.folder.resolve()
        return resolved.name if resolved.parent.name == "snapshots" else None


def file_hashes(folder: Path) -> dict[str, str]:
    """Path inside `folder` -> SHA-256, for every file but the manifest itself."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def written_rounding(folder: Path) -> Rounding:
    """How the weights in `folder` were rounded, as its manifest says; to nearest where it has none or says nothing.

    Raises InputError if there is a manifest that is not sound.
    """
    if not (folder / MANIFEST).exists():
        return "nearest"
    said = parse_object(read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES), str(folder / MANIFEST)).get("rounding")
    return "repair" if said == "repair" else "nearest"


def write_manifest(
    folder: Path, source: Source, guard: Guard, rounding: Rounding, ruling: str, verified: bool, evidence: Any
) -> None:
    """guardfold.json: what these files are, where they came from, and everything that was measured of them."""
    manifest = {
        "guardfold": __version__,
        "verdict": ruling,
        "verified": verified,
        "status": "VERIFIED" if verified else "NOT VERIFIED",
        "source": {"model": source.name, "revision": source.revision},
        "guard": {
            "sha256": guard.hash,
            "interventions": guard.describe(),
            "provenance": dict(guard.provenance),
        },
        "rounding": rounding,
        "files": file_hashes(folder),
        "figures": evidence,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, source: Source, guard: Guard, ruling: str, verified: bool, measured: str) -> None:
    """README.md, a model card: base model, method, `measured` (Markdown), limits, the base's licence."""
    on_hub = source.name.count("/") == 1
    data = ModelCardData(
        base_model=source.name if on_hub else None,
        license=_licence(source.folder),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["guardfold", "vlm-guard"],
        base_model_relation=_relation(folder) if on_hub else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {source.name}, guarded",
        _standing(ruling, verified),
        _METHOD.format(source=source.name, revision=source.revision or "unknown", version=__version__),
        "```json\n" + json.dumps(guard.describe(), indent=2) + "\n```",
        "## Load it",
        _LOAD,
        "## Measured",
        measured,
        "## Limits",
        _LIMITS,
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        metadata = metadata_load(card)
    except Exception:  # foreign YAML may fail in any way; without it there is no licence to carry over
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) else None


def _relation(folder: Path) -> str:
    return "adapter" if (folder / "adapter_config.json").is_file() else "finetune"


def _standing(ruling: str, verified: bool) -> str:
    if verified:
        return f"Verdict: **{ruling}** than the original, on the probes and with the figures below."
    return (
        f"**NOT VERIFIED.** Verdict: {ruling}. These weights were not shown to be safer than the original's; "
        "they are for research, not for deployment as a guarded model."
    )


_METHOD = """\
Made from `{source}` (revision {revision}) with guardfold {version}: the guard below was folded into the weights, so
that any runtime which loads the original loads this, with no custom code. It follows VLM-Guard (arXiv 2502.10486):
safety steering directions are extracted from the language model with paired harmful and harmless queries, and what
the layers write along them is removed from the output weights of attention and MLP. The guard itself, with its
directions, is in `guardfold/guard.safetensors`; `guardfold.json` holds every hash and figure."""

_LOAD = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
```"""

_LIMITS = """\
- Projecting a safety direction out is, on its own, the same edit as refusal ablation and can make a model less safe.
  Only the figures above say what it did here.
- A guard in the weights can be removed by whoever holds the weights, and is not adversarially robust.
- Refusals were judged by their phrases, answers were decoded greedily, and the probes are short plain questions; other
  prompts, languages, images and attacks were not measured.
- Limits and licence of the original model apply to this one as well."""
