"""What guards are made of: a model, anchors and benign prompts in four parts, and what is measured of them, once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ..base.errors import InputError
from ..model.roles import mlp_parts, skipped_on_text
from ..model.vlm import VLM
from ..prompts.prompts import Anchors, Prompt
from .calibration import Examples, Part, Role, deal, examples
from .directions import Directions, extract
from .linear_probe import least_used
from .transcripts import Usage


@dataclass(frozen=True)
class Settings:
    """What the user asked of a guard; None lets validation choose.

    scope, rank, strength: of a projection.  layers: where it acts.  rate: share of harmless positions that reach t0.
    recycle: whether neurons take the place of the least used ones (else the MLP is widened).  beta: steepness of a
    gate's corners.
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
    whether a widened MLP can be given biases.
    """

    vlm: VLM
    anchors: Anchors
    benign: Sequence[Prompt]
    depth: int
    dense: Sequence[int]
    gains_biases: bool
    settings: Settings = field(default_factory=Settings)
    _examples: dict[tuple[Role, bool], dict[int, Examples]] = field(default_factory=dict)
    _usage: dict[int, Usage] = field(default_factory=dict)

    @cached_property
    def parts(self) -> dict[Role, Part]:
        """Anchors and benign prompts, dealt into four parts. InputError if there are too few of either."""
        return deal(self.anchors, self.benign)

    @cached_property
    def directions(self) -> Directions:
        """The steering directions of every layer, from the fit part."""
        return extract(self.vlm, self.parts["fit"].anchors, range(self.depth), self.settings.rank, every=True)

    @cached_property
    def tried(self) -> list[int]:
        """The layers tried for something that the MLP writes: of the upper half, evenly spaced, those with a dense MLP
        that every prompt passes. InputError if there are none.
        """
        skipped = skipped_on_text(self.vlm.model)
        tried = [layer for layer in upper_layers(self.depth) if layer in self.dense and layer not in skipped]
        if not tried:
            kind = self.vlm.model.config.model_type
            raise InputError(f"{kind}: no upper layer has a dense MLP; a gate cannot be folded there")
        return tried

    def examples(self, role: Role, neurons: bool = False) -> dict[int, Examples]:
        """Returns layer -> examples of a part: what the MLPs of the tried layers read or, with `neurons`, their
        neurons.
        """
        if (role, neurons) not in self._examples:
            usage = self._usage if role == "fit" and not neurons else None
            self._examples[role, neurons] = examples(self.vlm, self.parts[role], self.tried, role, usage, neurons)
        return self._examples[role, neurons]

    @property
    def biases(self) -> bool:
        """Whether the MLPs will have biases once guarded."""
        biased = mlp_parts(self.vlm.layers[self.tried[0]]).biased
        return biased or (not self.settings.recycle and self.gains_biases)

    def places(self, layer: int, count: int) -> tuple[int, ...]:
        """Returns the `count` least used neurons of a layer, where neurons are recycled; none where the MLP is
        widened.
        """
        if not self.settings.recycle:
            return ()
        self.examples("fit")
        return least_used(self._usage[layer].importance(self._down(layer)), count)

    def _down(self, layer: int) -> Tensor:
        return mlp_parts(self.vlm.layers[layer]).down.weight


UPPER_LAYERS = 4
"""At most so many layers are tried, evenly spaced over the upper half."""


def upper_layers(depth: int) -> list[int]:
    """Returns the layers tried in a model of `depth`."""
    half = list(range(depth // 2, depth))
    if len(half) <= UPPER_LAYERS:
        return half
    return [half[i * (len(half) - 1) // (UPPER_LAYERS - 1)] for i in range(UPPER_LAYERS)]
