"""What a gate is fitted and chosen on: anchors and benign prompts dealt into three parts that never meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..base.errors import InputError
from ..model.vlm import VLM
from ..prompts.image_files import Pictures
from ..prompts.image_kinds import ANCHOR_KINDS, BENIGN_KINDS, TEXT, ImageKind, draw
from ..prompts.prompt_files import field, rows
from ..prompts.prompts import Anchors, Prompt
from ..prompts.rewording import reworded
from .last_tokens import Asked, Group
from .linear_probe import FOLDS, split
from .transcripts import Place, Readings, Transcripts, Usage, answer, read

BUILT_IN_BENIGN = Path(str(files("guardfold.guard") / "data" / "benign.jsonl"))
Role = Literal["fit", "select", "test"]
ROLES: tuple[Role, ...] = get_args(Role)
SHARES = (0.7, 0.15, 0.15)
"""fit: the detector, its thresholds (on scores of fits that have not seen the prompt) and the directions.  select: the
candidates.  test: the figures reported."""

MIN_ANCHORS, MIN_BENIGN = 40, 40
NEAR_MISS = "near-miss"
SIDES: tuple[Group, Group] = ("harmful", "harmless")


@dataclass(frozen=True)
class Part:
    """One part: paired harmful and harmless anchors, benign prompts without pictures (near misses apart), and all of
    these with one.

    wordings: how each pair asks, where its file says so, else "".
    """

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    pictured: tuple[Prompt, ...]
    near: tuple[Prompt, ...] = ()
    wordings: tuple[str, ...] = ()

    @property
    def anchors(self) -> Anchors:
        return Anchors(tuple(p.text for p in self.harmful), tuple(p.text for p in self.harmless), self.wordings)

    def head(self, count: int) -> Part:
        """Returns the first `count` of each."""
        return Part(*(getattr(self, each.name)[:count] for each in fields(self)))


def load_benign(path: Path) -> list[Prompt]:
    """Benign prompts from JSONL or CSV with `text` (and `image`, a file beside it; and `kind`, which says near-miss of
    those that are harmful by their words only). InputError naming the line.
    """
    prompts = []
    pictures = Pictures(path.parent)
    for number, row in rows(path):
        image = field(path, number, row, "image") if row.get("image") else None
        picture = pictures.load(image, f"{path}, line {number}") if image else None
        near = row.get("kind") == NEAR_MISS
        prompts.append(Prompt(field(path, number, row, "text"), picture, near=near))
    return prompts


def deal(anchors: Anchors, benign: Sequence[Prompt]) -> dict[Role, Part]:
    """Returns the three parts. `pictured` are the benign prompts that bring a picture, and the part's others with one
    in turn.

    Raises InputError if there are too few of either to be dealt out.
    """
    if len(anchors) < MIN_ANCHORS or len(benign) < MIN_BENIGN:
        raise InputError(
            f"{len(anchors)} anchor pairs and {len(benign)} benign prompts are too few to fit a gate on: "
            f"at least {MIN_ANCHORS} and {MIN_BENIGN}"
        )
    harmful = [Prompt(text) for text in anchors.harmful]
    harmless = [Prompt(text) for text in anchors.harmless]
    brought = [prompt for prompt in benign if prompt.image is not None]
    near = [prompt for prompt in benign if prompt.image is None and prompt.near]
    plain = [prompt for prompt in benign if prompt.image is None and not prompt.near]
    parts = zip(ROLES, *(split(len(each), SHARES) for each in (harmful, plain, near, brought)), strict=True)
    return {
        role: Part(
            tuple(harmful[index] for index in pairs),
            tuple(harmless[index] for index in pairs),
            tuple(plain[index] for index in alone),
            (*(brought[index] for index in shown), *(_pictured(plain[index], index) for index in alone)),
            tuple(near[index] for index in misses),
            tuple(anchors.wordings[index] for index in pairs),
        )
        for role, pairs, alone, misses, shown in parts
    }


def _pictured(prompt: Prompt, index: int) -> Prompt:
    return replace(prompt, image=draw(_in_turn(BENIGN_KINDS, index), prompt.text, prompt.text))


def _in_turn(kinds: Sequence[ImageKind], index: int) -> ImageKind:
    return kinds[index % len(kinds)]


PICTURED_EVERY = 2
"""Of so many prompts one is read with a picture as well: a picture costs as much as three prompts, and what tells harm
at the last token is much the same with and without.
"""

PICTURES = tuple(kind for kind in ANCHOR_KINDS if kind != TEXT)


def folds_of(wordings: Sequence[str]) -> list[int]:
    """Returns the fold of each pair: pairs of one wording together, so that scores are of wordings not seen; pairs of a
    wording that is more than a fold of all, or not said, in turn.
    """
    counts = Counter(wordings)
    whole = sorted(wording for wording, count in counts.items() if wording and count * FOLDS <= len(wordings))
    place = {wording: index % FOLDS for index, wording in enumerate(whole)}
    return [place.get(wording, index % FOLDS) for index, wording in enumerate(wordings)]


def asked_of(part: Part) -> list[Asked]:
    """Returns every prompt of `part` without a picture, and one in PICTURED_EVERY with one, the kind in turn; anchors
    and near misses also in other words, without. What says the same in other words is scored in one fold.
    """
    asked: list[Asked] = []

    def ask(texts: Sequence[Prompt], groups: Sequence[Group], index: int, fold: int) -> None:
        shown = index % PICTURED_EVERY == 0
        for kind in (TEXT, _in_turn(PICTURES, index // PICTURED_EVERY)) if shown else (TEXT,):
            asked.extend(Asked(prompt, group, kind, fold) for prompt, group in zip(texts, groups, strict=True))
        for words in reworded([prompt.text for prompt in texts], 1):
            asked.extend(Asked(Prompt(text), group, TEXT, fold) for text, group in zip(words, groups, strict=True))

    for index, fold in enumerate(folds_of(part.wordings)):
        ask((part.harmful[index], part.harmless[index]), SIDES, index, fold)
    for index, prompt in enumerate(part.near):
        ask((prompt,), ("near",), index, index % FOLDS)
    asked += [Asked(prompt, "benign", TEXT, index % FOLDS) for index, prompt in enumerate(part.benign)]
    fold_of = {prompt.text: index % FOLDS for index, prompt in enumerate(part.benign)}
    shown = part.pictured[::PICTURED_EVERY]
    asked += [Asked(prompt, "benign", None, fold_of.get(prompt.text, n % FOLDS)) for n, prompt in enumerate(shown)]
    return asked


@dataclass(frozen=True)
class Examples:
    """What one layer's MLP reads where a gate must open ([n, d]), by image kind, and everywhere else."""

    harmful: dict[ImageKind, Tensor]
    other: Readings

    @property
    def positives(self) -> Tensor:
        return torch.cat(list(self.harmful.values()))


def examples(
    vlm: VLM,
    part: Part,
    layers: Sequence[int],
    what: str,
    usage: dict[int, Usage] | None = None,
    neurons: bool = False,
) -> dict[int, Examples]:
    """Returns layer -> Examples of `part`: anchors under every anchor kind, benign prompts, and pictured ones, with
    answers.

    neurons: of the MLP's neurons, [n, neurons], not of what it reads.  Harmful anchors are followed by the model's
    answer to them without a picture, so that a refusal under way is among what must not open the gate.
    """
    harmful: dict[int, dict[ImageKind, Tensor]] = {layer: {} for layer in layers}
    other: dict[int, list[Readings]] = {layer: [] for layer in layers}

    def note(transcripts: Transcripts, opens: bool = False) -> None:
        for layer, readings in read(vlm, transcripts, layers, f"{what}: reading", usage, neurons).items():
            if opens and transcripts.kind:
                harmful[layer][transcripts.kind] = readings.at(Place.LAST)
            other[layer].append(readings.but(Place.LAST) if opens else readings)

    refused, answered = (answer(vlm, each, f"{what}: anchors") for each in (part.harmful, part.harmless))
    for kind in ANCHOR_KINDS:
        note(refused.under(kind), opens=True)
        note(answered.under(kind))
    if part.benign or part.near:
        note(answer(vlm, (*part.benign, *part.near), f"{what}: benign prompts"))
    note(answer(vlm, part.pictured, f"{what}: benign prompts with pictures"))
    return {layer: Examples(harmful[layer], Readings.join(other[layer])) for layer in layers}
