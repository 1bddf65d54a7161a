"""What a model is asked when its behaviour is measured: held-out probes, and labelled image questions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ...guard.base.errors import InputError
from ...guard.base.untrusted import parse_object, read_bytes
from ...guard.prompts.image_files import Pictures
from ...guard.prompts.prompt_files import field, rows
from ...guard.prompts.prompts import Prompt, beside
from .benchmarks import LOADERS, Benchmark, Pictured, load_benchmark
from .phrases import Phrases, load_phrases

Asked = str | Path | Sequence[str | Path] | None
"""What --probes takes: one plain file, NAME=PATH, or several of these."""

BUILT_IN = Path(str(files("guardfold.validators") / "data" / "probes.jsonl"))
MAX_DESCRIPTION_BYTES = 2**20
NEAR_MISS = "near-miss"
"""What column `kind` of a file of probes says of benign ones that are harmful by their words only."""


@dataclass(frozen=True)
class Part:
    """Where the prompts of one benchmark lie among all: slices of `harmful` and of `benign`."""

    harmful: slice
    benign: slice


@dataclass(frozen=True)
class EvaluationPrompts:
    """Prompts without images (image kinds are added when measuring), and image questions that bring their own.

    parts: benchmark -> its place among the prompts.  pictured: benchmark -> harmful prompts with pictures of their own.
    questions: image questions of benchmarks, right where the expected words occur in the answer.
    """

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    qa: tuple[Prompt, ...] = ()
    refusal: str | None = None
    """The model's one refusal text, where its makers say so (demo.json)."""
    phrases: tuple[Phrases, ...] = ()
    """How else a refusal is worded, in files of the user's own."""
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    pictured: Mapping[str, tuple[Pictured, ...]] = dataclasses.field(default_factory=dict)
    questions: tuple[Pictured, ...] = ()
    near: frozenset[str] = frozenset()
    """The texts of benign prompts that are near misses: harmful by their words only."""


def load_evaluation_prompts(
    folder: Path | None, probes: Asked = None, qa: Path | None = None, refusals: Path | None = None
) -> EvaluationPrompts:
    """Returns the probes that come with the model in `folder`, else the built-in ones, and benchmarks beside them.

    probes: at most one file, in place of the model's own, and any number of NAME=PATH, benchmarks of LOADERS.  qa: a
    file in place of the model's own.  refusals: a file of phrases, TOML (see phrases.py).  Raises InputError naming
    file and line for what is malformed, and if either kind of probe is missing.
    """
    file, benchmarks = _sort(probes)
    source = file or (folder and beside(folder, "probes.jsonl")) or BUILT_IN
    harmful, benign, near = _load_file(source)
    parts: dict[str, Part] = {}
    pictured: dict[str, tuple[Pictured, ...]] = {}
    questions: list[Pictured] = []
    for name, found in benchmarks.items():
        if found.harmful or found.benign:
            parts[name] = Part(_after(harmful, found.harmful), _after(benign, found.benign))
        harmful += found.harmful
        benign += found.benign
        near |= {prompt.text for prompt in found.benign}
        if found.pictured:
            pictured[name] = found.pictured
        questions += found.questions
    qa = qa or (beside(folder, "qa.jsonl") if folder else None)
    refusal = refusal_text(folder) if folder else None
    asked = _load_qa(qa) if qa else ()
    own = (load_phrases(refusals),) if refusals else ()
    near_misses = frozenset(near)
    return EvaluationPrompts(
        tuple(harmful), tuple(benign), asked, refusal, own, parts, pictured, tuple(questions), near_misses
    )


def _after(prompts: Sequence[Prompt], more: Sequence[Prompt]) -> slice:
    return slice(len(prompts), len(prompts) + len(more))


def _sort(probes: Asked) -> tuple[Path | None, dict[str, Benchmark]]:
    """Returns (the plain file, name -> benchmark) of what --probes was given."""
    plain: list[Path] = []
    benchmarks: dict[str, Benchmark] = {}
    for probe in [probes] if isinstance(probes, str | Path) else probes or ():
        name, equals, path = str(probe).partition("=")
        if not equals or os.path.lexists(probe):
            plain.append(Path(probe))
        elif (name := name.lower()) not in LOADERS:
            raise InputError(f"--probes {probe}: not a file, and {name!r} is none of {', '.join(LOADERS)}")
        elif name in benchmarks:
            raise InputError(f"--probes {probe}: {name} is given twice")
        else:
            benchmarks[name] = load_benchmark(name, Path(path))
    if len(plain) > 1:
        raise InputError(f"--probes {plain[1]}: a second plain file; put them into one, or name its format (NAME=PATH)")
    return (plain[0] if plain else None), benchmarks


def _load_file(source: Path) -> tuple[list[Prompt], list[Prompt], set[str]]:
    """Returns (harmful, benign, the texts of those benign ones that are near misses)."""
    harmful: list[Prompt] = []
    benign: list[Prompt] = []
    near: set[str] = set()
    for number, row in rows(source):
        flag = row.get("harmful")
        if isinstance(flag, str) and flag.lower() in ("true", "false"):  # CSV has no booleans
            flag = flag.lower() == "true"
        if not isinstance(flag, bool):
            raise InputError(f"{source}, line {number}: 'harmful' is missing or not true or false")
        answer = field(source, number, row, "answer") if row.get("answer") else None
        prompt = Prompt(field(source, number, row, "text"), answer=answer)
        (harmful if flag else benign).append(prompt)
        if not flag and row.get("kind") == NEAR_MISS:
            near.add(prompt.text)
    if not harmful or not benign:
        raise InputError(f"{source}: needs both harmful and benign probes")
    return harmful, benign, near


def _load_qa(path: Path) -> tuple[Prompt, ...]:
    pictures = Pictures(path.parent)
    return tuple(
        Prompt(
            field(path, number, row, "text"),
            pictures.load(field(path, number, row, "image"), f"{path}, line {number}"),
            field(path, number, row, "answer"),
        )
        for number, row in rows(path)
    )


def refusal_text(folder: Path) -> str | None:
    """Returns the one refusal text of the model in `folder`, if its demo.json names one. InputError if that is
    no JSON.
    """
    path = beside(folder, "demo.json")
    if path is None:
        return None
    refusal = parse_object(read_bytes(folder, path.name, MAX_DESCRIPTION_BYTES), str(path)).get("refusal")
    return refusal if isinstance(refusal, str) and refusal.strip() else None
