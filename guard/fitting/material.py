"""What guards are made of: a model, anchors and benign prompts in three parts, and what is measured of them, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..base.errors import InputError
from ..model.roles import mlp_parts, skipped_on_text
from ..model.vlm import VLM
from ..prompts.prompts import Anchors, Prompt
from .calibration import Examples, Part, Role, asked_of, deal, examples
from .directions import Directions, extract
from .last_tokens import LastTokens, read_last
from .linear_probe import least_used
from .transcripts import Usage


@dataclass(frozen=True)
class Settings:
    """What the user asked of a guard; None lets validation choose.

    scope, rank, strength: of a projection.  layers: where it acts.  rate: share of benign prompts at which a gate may
    newly open.  recycle: whether neurons take the place of the least used ones (else the MLP is widened).  beta:
    steepness of a gate's corners.
    """

    scope: str = "sublayers"
    rank: int = 1
    layers: Sequence[int] | None = None
    strength: float | None = None
    rate: float | None = None
    recycle: bool = True
    beta: float = 256.0


@dataclass
class Material:
    """What guards of one model are made of. Everything is measured when it is first asked for, and kept.

    depth: how many decoder layers the model has.  dense: those with a dense MLP or a shared expert.  gains_biases:
    whether a widened MLP can be given biases.  refuses: whether an answer begins as a refusal.  notes: what was found
    on the way, for provenance, as JSON.
    """

    vlm: VLM
    anchors: Anchors
    benign: Sequence[Prompt]
    depth: int
    dense: Sequence[int]
    gains_biases: bool
    settings: Settings = field(default_factory=Settings)
    refuses: Callable[[str], bool] = lambda _answer: False
    notes: dict[str, Any] = field(default_factory=dict)
    _examples: dict[tuple[Role, tuple[int, ...], bool], dict[int, Examples]] = field(default_factory=dict)
    _usage: dict[int, Usage] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[Role, Part]:
        """Anchors and benign prompts, dealt into three parts. InputError if there are too few of either."""
        return deal(self.anchors, self.benign)

    @cached_property
    def directions(self) -> Directions:
        """The steering directions of every layer, from the first PAIRS of the fit part."""
        anchors = self.parts["fit"].anchors.head(PAIRS)
        return extract(self.vlm, anchors, range(self.depth), self.settings.rank, every=True)

    @cached_property
    def upper(self) -> list[int]:
        """The layers of the upper half (or those asked for) with a dense MLP that every prompt passes. InputError if
        there are none.
        """
        asked = range(self.depth // 2, self.depth) if self.settings.layers is None else self.settings.layers
        skipped = skipped_on_text(self.vlm.model)
        upper = [layer for layer in asked if layer in self.dense and layer not in skipped]
        if not upper:
            kind = self.vlm.model.config.model_type
            raise InputError(f"{kind}: no upper layer has a dense MLP; a gate cannot be folded there")
        return upper

    @property
    def tried(self) -> list[int]:
        """The layers tried for what is not chosen by how well they tell harm: of the upper ones, evenly spaced."""
        return spaced(self.upper, TRIED)

    @cached_property
    def last_tokens(self) -> LastTokens:
        """What stands at the last tokens of the fit part's prompts, in every upper layer."""
        return read_last(self.vlm, asked_of(self.parts["fit"]), self.upper, self.refuses, "fit: reading")

    def examples(self, role: Role, layers: Sequence[int], neurons: bool = False) -> dict[int, Examples]:
        """Returns layer -> examples of a part: what the MLPs of `layers` read along EXAMPLES prompts of each sort or,
        with `neurons`, their neurons along all.
        """
        key = role, tuple(layers), neurons
        if key not in self._examples:
            usage = self._usage if role == "fit" and not neurons else None
            part = self.parts[role] if neurons else self.parts[role].head(EXAMPLES * self.vlm.batch_size)
            self._examples[key] = examples(self.vlm, part, layers, role, usage, neurons)
        return self._examples[key]

    @property
    def biases(self) -> bool:
        """Whether the MLPs will have biases once guarded."""
        biased = mlp_parts(self.vlm.layers[self.upper[0]]).biased
        return biased or (not self.settings.recycle and self.gains_biases)

    def places(self, layer: int, count: int) -> tuple[int, ...]:
        """Returns the `count` least used neurons of a layer, where neurons are recycled; none where the MLP is
        widened.
        """
        if not self.settings.recycle:
            return ()
        if layer not in self._usage:
            self.examples("fit", [layer])
        return least_used(self._usage[layer].importance(self._down(layer)), count)

    def _down(self, layer: int) -> Tensor:
        return mlp_parts(self.vlm.layers[layer]).down.weight


PAIRS = 128
"""Anchor pairs that directions are extracted from: a mean of so many does not move any more."""

EXAMPLES = 2
"""Batches of prompts of each sort that are read position by position."""

TRIED = 4


def spaced(layers: Sequence[int], count: int) -> list[int]:
    """Returns at most `count` of `layers`, evenly spaced, with the first and the last."""
    if len(layers) <= count:
        return list(layers)
    return [layers[index * (len(layers) - 1) // (count - 1)] for index in range(count)]
