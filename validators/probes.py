"""What a model is asked when its behaviour is measured: held-out probes, and labelled image questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..guard.errors import InputError
from ..guard.prompts import Prompt, beside, field, load_image, rows

BUILT_IN = Path(str(files("guardfold.validators") / "data" / "probes.jsonl"))
MAX_DESCRIPTION_BYTES = 2**20


@dataclass(frozen=True)
class Probes:
    """Prompts without images (image kinds are added when measuring), and image questions that bring their own."""

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    qa: tuple[Prompt, ...] = ()
    refusal: str | None = None
    """The model's one refusal text, where its makers say so (demo.json)."""


def load_probes(folder: Path, probes: Path | None = None, qa: Path | None = None) -> Probes:
    """The probes that come with the model in `folder`, else the built-in ones; `probes` and `qa` override.

    InputError naming file and line for what is malformed, and if either kind of probe is missing.
    """
    source = probes or beside(folder, "probes.jsonl") or BUILT_IN
    harmful: list[Prompt] = []
    benign: list[Prompt] = []
    for number, row in rows(source):
        flag = row.get("harmful")
        if isinstance(flag, str) and flag.lower() in ("true", "false"):  # CSV has no booleans
            flag = flag.lower() == "true"
        if not isinstance(flag, bool):
            raise InputError(f"{source}, line {number}: 'harmful' is missing or not true or false")
        answer = field(source, number, row, "answer") if row.get("answer") else None
        (harmful if flag else benign).append(Prompt(field(source, number, row, "text"), answer=answer))
    if not harmful or not benign:
        raise InputError(f"{source}: needs both harmful and benign probes")
    qa = qa or beside(folder, "qa.jsonl")
    return Probes(tuple(harmful), tuple(benign), _load_qa(qa) if qa else (), refusal_text(folder))


def _load_qa(path: Path) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(
            field(path, number, row, "text"),
            load_image(path.parent, field(path, number, row, "image"), f"{path}, line {number}"),
            field(path, number, row, "answer"),
        )
        for number, row in rows(path)
    )


def refusal_text(folder: Path) -> str | None:
    """The one refusal text of the model in `folder`, if its demo.json names one. InputError if that is no JSON."""
    path = folder / "demo.json"
    if not path.is_file() or path.stat().st_size > MAX_DESCRIPTION_BYTES:
        return None
    try:
        refusal = json.loads(path.read_text(encoding="utf-8")).get("refusal")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON object ({error})") from error
    return refusal if isinstance(refusal, str) and refusal.strip() else None
