"""What goes with the weights: the manifest (guardfold.json) and the model card (README.md)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from ..._version import __version__
from ...guard.base.errors import InputError
from ...guard.base.hub import is_hub_id
from ...guard.base.remote_code import code_of
from ...guard.base.untrusted import check_name, entries, open_regular, parse_object, read_bytes
from ...guard.guard import Guard
from ...guard.model.vlm import auto_class, read_config
from ..checkpoint.rounding import Rounding
from ..checkpoint.staging import MANIFEST

MAX_MANIFEST_BYTES = 64 * 2**20
NOT_READ = "not read"
"""In place of a hash."""

GUARD_FILE = Path("guardfold") / "guard.safetensors"
"""In a folder of its own: some runtimes load every safetensors file that lies beside the weights."""


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
        merged = {"adapter": dict(self.adapter)} if self.adapter else {}
        return {"model": self.name, "revision": self.revision, **merged}

    @property
    def title(self) -> str:
        return f"{self.name} with {self.adapter['name']}" if self.adapter else self.name

    @property
    def revision(self) -> str | None:
        resolved = self.folder.resolve()
        return resolved.name if resolved.parent.name == "snapshots" else None


@dataclass(frozen=True)
class AdapterNotes:
    """What is said of a guard that was written as adapters: how it is held, what there is to loading it besides a
    PeftModel, Markdown; and what they do not hold of the guard that was asked for, a line each.
    """

    held: str
    load: str
    left_out: tuple[str, ...] = ()


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


def written_rounding(folder: Path) -> Rounding:
    """How the weights in `folder` were rounded, as its manifest says; to nearest where it has none or says nothing.

    Raises InputError if there is a manifest that is not sound.
    """
    if not (folder / MANIFEST).exists():
        return "nearest"
    said = parse_object(read_bytes(folder, MANIFEST, MAX_MANIFEST_BYTES), str(folder / MANIFEST)).get("rounding")
    return "repair" if said == "repair" else "nearest"


def write_manifest(
    folder: Path,
    source: Source,
    guard: Guard,
    rounding: Rounding,
    ruling: str,
    verified: bool,
    evidence: Any,
    notes: AdapterNotes | None = None,
) -> None:
    """guardfold.json: what these files are, where they came from, and everything that was measured of them."""
    manifest = {
        "guardfold": __version__,
        "verdict": ruling,
        "verified": verified,
        "status": _status(verified),
        **({"format": "lora", "left_out": list(notes.left_out)} if notes else {}),
        "source": source.describe(),
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


def write_card(
    folder: Path,
    source: Source,
    guard: Guard,
    ruling: str,
    verified: bool,
    measured: str,
    *,
    pictures: Mapping[str, str] | None = None,
    command: str | None = None,
    notes: AdapterNotes | None = None,
) -> None:
    """README.md, a model card: what this is, how to load and reproduce it, what was measured, limits, licence.

    measured: Markdown.  pictures: path inside `folder` -> what it shows.  command: what makes it again.  notes: where
    it is adapters.
    """
    on_hub = is_hub_id(source.name)
    terms: dict[str, Any] = _terms(source.folder)
    adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(
        base_model=source.name if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["guardfold", "vlm-guard"],
        **terms,
    )
    merged = f" with the adapter `{source.adapter['name']}` merged" if source.adapter else ""
    base = f"[{source.name}](https://huggingface.co/{source.name})" if on_hub else f"`{source.name}`"
    base += merged
    names = {
        "base": base,
        "source": source.name,
        "commit": f", commit `{source.revision}`" if source.revision else "",
        "version": __version__,
        "licence": terms.get("license_name") or terms.get("license") or "unknown to guardfold",
        **_code(source.folder),
        "again": command or f"guardfold export --model {source.name} --guard {GUARD_FILE.as_posix()}",
    }
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {source.title}, guarded",
        _standing(ruling, verified),
        _WHAT.format(**names, held=notes.held if notes else _IN_WEIGHTS if guard.in_weights else _IN_GRAPHS),
        *(_missing(notes) if notes else ()),
        "```json\n" + json.dumps(guard.describe(), indent=2) + "\n```",
        *([_CODE.format(files=_modules(folder))] if names["trust"] else []),
        _USE,
        *_loading(folder, names),
        *([notes.load] if notes else ()),
        "## Measured",
        measured,
        *(f"![{caption}]({path})" for path, caption in (pictures or {}).items()),
        _LIMITS,
        _AGAIN.format(**names),
        _LICENCE.format(**names),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _missing(notes: AdapterNotes) -> list[str]:
    """The paragraphs about what is left out, if anything is."""
    lines = "\n".join(f"- {each}" for each in notes.left_out)
    return ["**Holds only a part of the guard that was asked for.** Left out:", lines] if lines else []


def extend_card(folder: Path) -> None:
    """Says in the card in `folder` how its graphs are run."""
    card = folder / "README.md"
    said = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    card.write_text("\n\n".join([said.rstrip(), *_running(folder)]) + "\n", encoding="utf-8")


def _loading(folder: Path, names: Mapping[str, str]) -> list[str]:
    if (folder / "adapter_config.json").is_file():
        return ["## Load it", _LOAD_ADAPTER.format(**names)]
    graphs, weights = _running(folder), any(folder.glob("*.safetensors"))
    if not weights and graphs:
        return graphs
    return ["## Load it", _LOAD.format(**names), *([] if names["trust"] else [_LOAD_GRAPHS]), *graphs]


def _code(folder: Path) -> dict[str, str]:
    """What the card says differently of a base in `folder` that needs code of its own (then trusted) to be loaded."""
    if not code_of(folder):
        return {"auto": "AutoModelForImageTextToText", "trust": "", "serve": "", "needs": "no custom code, no hooks"}
    return {
        "auto": auto_class(read_config(folder)).__name__,
        "trust": ", trust_remote_code=True",
        "serve": " --trust-remote-code",
        "needs": "the original's own code, no hooks",
    }


def _modules(folder: Path) -> str:
    return ", ".join(f"`{path.name}`" for path in sorted(folder.glob("*.py"))) or "the files `*.py` beside its weights"


def _running(folder: Path) -> list[str]:
    graphs = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
    return ["## Run its ONNX graphs", _RUN, "\n".join(f"- `{name}`" for name in graphs)] if graphs else []


def _terms(folder: Path) -> dict[str, str]:
    """license, license_name and license_link of the card in `folder`, where they are such as the hub takes."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        metadata = metadata_load(card)
    except Exception:  # foreign YAML may fail in any way; without it there is no licence to carry over
        return {}
    found = metadata if isinstance(metadata, dict) else {}
    terms = {name: found[name] for name in _TERMS if isinstance(found.get(name), str)}
    return terms if re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", terms.get("license", "")) else {}


_TERMS = ("license", "license_name", "license_link")


def _standing(ruling: str, verified: bool) -> str:
    if verified:
        return f"Verdict: **{ruling}** than the original, on the probes and with the figures below."
    return (
        f"**NOT VERIFIED.** Verdict: {ruling}. These weights were not shown to be safer than the original's; "
        "they are for research, not for deployment as a guarded model."
    )


_IN_WEIGHTS = "folded into its weights"
_IN_GRAPHS = "which weights cannot hold, traced into its ONNX graphs (their weights are the original's)"

_RUN = """\
With onnxruntime: `guardfold chat FOLDER --runtime onnx "..."`. With transformers.js, where it has the family:
`AutoProcessor` and `AutoModelForImageTextToText`, both `from_pretrained(FOLDER)`. The graphs:"""

_WHAT = """\
## What this is

{base}{commit}, with a safety guard {held} by guardfold {version}. Vision-language models lose part of
their safety as soon as an image is attached; the guard is there to make harmful requests with an image be refused as
they are without (whether it does is measured below). Any runtime that loads the original loads this,
with {needs} and no second model.

The guard follows VLM-Guard ([arXiv 2502.10486](https://arxiv.org/abs/2502.10486)): safety steering directions are
extracted from the language model with paired harmful and harmless queries; what layers write along them is removed from
the output weights, or a detector in one MLP recognises harmful requests and writes the direction of a refusal. What was
done here, exactly (the directions are in `guardfold/guard.safetensors`, every hash and figure in `guardfold.json`):"""

_CODE = """\
**Loading this runs Python code of the original's**, with your rights: {files}. guardfold copies such code as it is and
does not check it; read it before you pass `trust_remote_code=True`."""

_USE = """\
## Intended use

What the original is meant for, where refusals must survive an attached image. Not a replacement for filters on input
and output, for human review where harm is likely, or for an evaluation on your own prompts and languages; not for uses
that the original's licence excludes."""

_LOAD = """\
`PATH` is this folder or its hub id.

**transformers**

```python
from transformers import {auto}, AutoProcessor

model = {auto}.from_pretrained("PATH"{trust})
processor = AutoProcessor.from_pretrained("PATH"{trust})
```

**vLLM**

```bash
vllm serve PATH --served-model-name guarded{serve}
guardfold check --endpoint http://localhost:8000/v1 --model guarded
```"""

_LOAD_GRAPHS = """\
**onnxruntime** (where this repository holds an `onnx` folder): three graphs, named as in transformers.js

```python
import onnxruntime

parts = ("vision_encoder", "embed_tokens", "decoder_model_merged")
sessions = {name: onnxruntime.InferenceSession(f"onnx/{name}.onnx") for name in parts}
```

**transformers.js** (the same graphs)

```js
import { AutoModelForImageTextToText, AutoProcessor } from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("PATH");
const model = await AutoModelForImageTextToText.from_pretrained("PATH", { dtype: "fp32" });
```"""

_LOAD_ADAPTER = """\
`PATH` is this folder or its hub id. The base's own weights stay as they are.

```python
from peft import PeftModel
from transformers import {auto}, AutoProcessor

model = PeftModel.from_pretrained({auto}.from_pretrained("{source}"{trust}), "PATH")
processor = AutoProcessor.from_pretrained("{source}"{trust})
```"""

_LIMITS = """\
## Limits

- Projecting a safety direction out is, on its own, the same edit as refusal ablation and can make a model less safe.
  Only the figures above say what it did here.
- A guard in the weights can be removed by whoever holds the weights, and is not adversarially robust.
- Refusals were judged by their phrases, answers were decoded greedily, and the probes are short plain questions; other
  prompts, languages, images and attacks were not measured.
- What the original gets wrong, this gets wrong as well."""

_AGAIN = """\
## Reproduce and verify

```bash
pip install guardfold=={version}
{again}
guardfold verify PATH
```

The first makes these weights again; the second says whether the files are, byte for byte, those that were measured."""

_LICENCE = """\
## Licence and attribution

A modified version of {base}{commit}. Licence of the original: {licence}; its terms apply to these weights, and the
credit for the model is its authors'. Changed by guardfold: the tensors that `guardfold.json` counts as edited, and
nothing else."""
