"""What a gate is fitted, set and chosen on: anchors and benign prompts dealt into four parts that never meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ..base.errors import InputError
from ..model.vlm import VLM
from ..prompts.image_files import Pictures
from ..prompts.image_kinds import ANCHOR_KINDS, BENIGN_KINDS, ImageKind, draw
from ..prompts.prompt_files import field, rows
from ..prompts.prompts import Anchors, Prompt
from .linear_probe import split
from .transcripts import Place, Readings, Transcripts, Usage, answer, read

BUILT_IN_BENIGN = Path(str(files("guardfold.guard") / "data" / "benign.jsonl"))
Role = Literal["fit", "threshold", "select", "test"]
ROLES: tuple[Role, ...] = get_args(Role)
SHARES = (0.4, 0.2, 0.2, 0.2)
"""fit: the detector and the directions.  threshold: t0 and t1.  select: the candidates.  test: the figures reported."""

MIN_ANCHORS, MIN_BENIGN = 40, 40


@dataclass(frozen=True)
class Part:
    """One part: paired harmful and harmless anchors, benign prompts without pictures, and some that bring their own."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]
    pictured: tuple[Prompt, ...]

    @property
    def anchors(self) -> Anchors:
        return Anchors(tuple(p.text for p in self.harmful), tuple(p.text for p in self.harmless))


def load_benign(path: Path) -> list[Prompt]:
    """Benign prompts from JSONL or CSV with `text` (and `image`, a file beside it). InputError naming the line."""
    prompts = []
    pictures = Pictures(path.parent)
    for number, row in rows(path):
        image = field(path, number, row, "image") if row.get("image") else None
        picture = pictures.load(image, f"{path}, line {number}") if image else None
        prompts.append(Prompt(field(path, number, row, "text"), picture))
    return prompts


def deal(anchors: Anchors, benign: Sequence[Prompt]) -> dict[Role, Part]:
    """Returns the four parts. `pictured` are the benign prompts that bring a picture, and the part's others with one in
    turn.

    Raises InputError if there are too few of either to be dealt out.
    """
    if len(anchors) < MIN_ANCHORS or len(benign) < MIN_BENIGN:
        raise InputError(
            f"{len(anchors)} anchor pairs and {len(benign)} benign prompts are too few to fit a gate on: "
            f"at least {MIN_ANCHORS} and {MIN_BENIGN}"
        )
    harmful = [Prompt(text) for text in anchors.harmful]
    harmless = [Prompt(text) for text in anchors.harmless]
    plain = [prompt for prompt in benign if prompt.image is None]
    brought = [prompt for prompt in benign if prompt.image is not None]
    parts = zip(ROLES, *(split(len(each), SHARES) for each in (harmful, plain, brought)), strict=True)
    return {
        role: Part(
            tuple(harmful[index] for index in pairs),
            tuple(harmless[index] for index in pairs),
            tuple(plain[index] for index in alone),
            (*(brought[index] for index in shown), *(_pictured(plain[index], index) for index in alone)),
        )
        for role, pairs, alone, shown in parts
    }


def _pictured(prompt: Prompt, index: int) -> Prompt:
    kind = BENIGN_KINDS[index % len(BENIGN_KINDS)]
    return replace(prompt, image=draw(kind, prompt.text, prompt.text))


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
    if part.benign:
        note(answer(vlm, part.benign, f"{what}: benign prompts"))
    note(answer(vlm, part.pictured, f"{what}: benign prompts with pictures"))
    return {layer: Examples(harmful[layer], Readings.join(other[layer])) for layer in layers}
