"""The model card, README.md: what this is, how to load and reproduce it, what was measured, limits, licence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from ..._version import __version__
from ...guard.base.hub import is_hub_id
from ...guard.base.remote_code import code_of
from ...guard.base.untrusted import printable
from ...guard.guard import Guard
from ...guard.model.generation import asks_for
from ...guard.model.vlm import auto_class, read_config
from ..formats import formats_in
from ..formats.base import Notes
from ..source import Source
from .manifest import GUARD_FILE


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
    notes: Notes | None = None,
) -> None:
    """Writes the card into `folder`, which holds the formats that it is to speak of.

    measured: Markdown.  pictures: path inside `folder` -> what it shows.  command: what makes it again.  notes: what
    its first format says of itself; by default, what weights do.
    """
    on_hub, formats, notes = is_hub_id(source.name), formats_in(folder), notes or Notes()
    terms: dict[str, Any] = _terms(source.folder)
    data = ModelCardData(
        base_model=source.name if on_hub else None,
        base_model_relation=formats[0].relation if on_hub else None,
        library_name=formats[0].library,
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
        _WHAT.format(**names, held=notes.held),
        *_missing(notes),
        "```json\n" + json.dumps(guard.describe(), indent=2) + "\n```",
        *([_CODE.format(files=_modules(folder))] if names["trust"] else []),
        _USE,
        *(part for cls in formats for part in cls.card(folder, names)),
        *([notes.load] if notes.load else ()),
        "## Measured",
        measured,
        *(f"![{caption}]({path})" for path, caption in (pictures or {}).items()),
        _LIMITS.format(asked=_asked(source.folder)),
        _AGAIN.format(**names),
        _LICENCE.format(**names),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def extend_card(folder: Path) -> None:
    """Says in the card in `folder` how those of its formats are used that were added to its weights."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    names = {"source": "PATH", **_code(folder)}
    added = [part for cls in formats_in(folder) if cls.derived for part in cls.card(folder, names)]
    card.write_text("\n\n".join([before.rstrip(), *added]) + "\n", encoding="utf-8")


def _missing(notes: Notes) -> list[str]:
    """Returns the paragraphs about what is left out, if anything is."""
    lines = "\n".join(f"- {line}" for line in notes.left_out)
    return ["**Holds only a part of the guard that was asked for.** Left out:", lines] if lines else []


def _code(folder: Path) -> dict[str, str]:
    """Returns what the card says differently of a base in `folder` that needs code of its own (then trusted) to be
    loaded.
    """
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


def _asked(folder: Path) -> str:
    """Returns what clients do with an answer that was not done here, as a parenthesis."""
    asked = ", ".join(f"`{name}` {printable(json.dumps(value))}" for name, value in asks_for(folder).items())
    return f" (without {asked}, which `generation_config.json` asks clients for)" if asked else ""


def _standing(ruling: str, verified: bool) -> str:
    if verified:
        return f"Verdict: **{ruling}** than the original, on the probes and with the figures below."
    return (
        f"**NOT VERIFIED.** Verdict: {ruling}. These weights were not shown to be safer than the original's; "
        "they are for research, not for deployment as a guarded model."
    )


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

_LIMITS = """\
## Limits

- Projecting a safety direction out is, on its own, the same edit as refusal ablation and can make a model less safe.
  Only the figures above say what it did here.
- A guard in the weights can be removed by whoever holds the weights, and is not adversarially robust.
- Refusals were judged by their phrases, answers were decoded greedily{asked}, and the probes are short plain questions;
  other prompts, languages, images and attacks were not measured.
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
