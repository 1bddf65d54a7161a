"""Projection of the residual stream layer by layer, gated: VLM-Guard's steps 2 and 3 in one pass.

Source: VLM-Guard (arXiv 2502.10486), the gate read from each position's own state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..model.roles import decoder_layers
from .base import PerLayer, TextStates, at_least_float32, check_bases, check_strength, on_output, parse_bases


@dataclass(frozen=True)
class ResidualProjection(PerLayer):
    """VLM-Guard's steps 2 and 3 in one pass, on the residual stream after layer l, each position deciding for itself.

    h*_l = h_l - strength h_l V_l^T V_l + alpha g_l h_l V_l^T V_l with g_l = 1[h_l . v_1 > 0]; alpha = 0 is the ungated
    form.  bases: layer -> V_l, [m, d], orthonormal rows, row 0 = v_1.  strength: in (0, 1].  alpha: finite, >= 0.
    Weights do not hold it: the skip connection carries what earlier layers wrote past every weight of layer l.
    """

    kind = "residual-projection"
    bases: Mapping[int, Tensor]
    strength: float = 1.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", check_bases(self.bases, self.kind))
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))
        object.__setattr__(self, "alpha", float(self.alpha))
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"{self.kind}: alpha {self.alpha} is not a finite number >= 0")

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "strength": self.strength, "alpha": self.alpha, "ranks": self.ranks}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(parse_bases(tensors, cls.kind), header["strength"], header["alpha"])

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """h <- h - (strength - alpha g) (h V_l^T) V_l, h what decoder layer l returns."""
        for layer, basis in self.bases.items():
            hook = on_output(lambda h, basis=basis: steer(h, basis, self.strength, self.alpha))  # type: ignore[misc]
            yield decoder_layers(model)[layer].register_forward_hook(hook)


def steer(states: Tensor, basis: Tensor, strength: float, alpha: float) -> Tensor:
    """h - (strength - alpha g) (h V^T) V with g = 1[h . v_1 > 0]: `states` [..., d]; `basis` [m, d], row 0 = v_1."""
    wide = at_least_float32(states)
    basis = basis.to(wide)
    along = wide @ basis.T
    gate = (along[..., :1] > 0).to(wide)
    return (wide - (strength - alpha * gate) * along @ basis).to(states.dtype)
