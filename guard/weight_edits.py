"""What an intervention may ask of weights: a small vocabulary in the field's terms, free of families and formats.

An intervention says which of these it needs (`Intervention.edits`); export/fold.py says which tensors of a family they
are, and each format of export/formats which of them it can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Sublayer = Literal["attention", "mlp"]
"""What writes to the residual stream in a decoder layer."""


@dataclass(frozen=True)
class MLPForm:
    """The form of a layer's dense MLP (or shared expert).

    gated: down(act(gate x) * up x), else down(act(gate x)).  biased: whether its neurons have biases, or can be given
    some.  neurons: how many it has.
    """

    gated: bool
    biased: bool
    neurons: int


FormOf = Callable[[int], MLPForm]
"""Layer -> the form of its dense MLP; raises InputError where it has none."""


@dataclass(frozen=True)
class ProjectWrites:
    """Take `strength` of span(basis) out of what is written to the residual stream: y - strength (y V^T) V.

    basis: V, [m, d], orthonormal rows.  layer: whose attention and MLP; None: everything that writes, the embedding and
    the vision path included.
    """

    basis: Tensor
    strength: float
    layer: int | None


@dataclass(frozen=True)
class ReplaceNeurons:
    """Put k neurons of the caller's into the MLP of `layer`: in place of those numbered `places`, or beside the others
    where that is empty.

    gate, up: what the neurons read, [k, d] (`up` is left out of a plain MLP).  gate_bias, up_bias: [k].  down: what
    each writes, [k, d].
    """

    layer: int
    places: tuple[int, ...]
    gate: Tensor
    gate_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor

    @property
    def biased(self) -> bool:
        """Whether it needs neurons with biases."""
        return bool(self.gate_bias.any() or self.up_bias.any())


@dataclass(frozen=True)
class AddLowRank:
    """Add L R to the output weight of a sublayer: down_proj or o_proj.

    left: L, [d, r].  right: R, [r, inputs], inputs being the neurons of the MLP or the attention's concatenated heads.
    """

    layer: int
    left: Tensor
    right: Tensor
    sublayer: Sublayer = "mlp"


@dataclass(frozen=True)
class AddBias:
    """Add `vector`, [d], to what a sublayer writes, at every position."""

    layer: int
    vector: Tensor
    sublayer: Sublayer = "mlp"


WeightEdit = ProjectWrites | ReplaceNeurons | AddLowRank | AddBias


@dataclass(frozen=True)
class LeakSite:
    """A place where nothing of span(basis) may be left: what the sublayers of `layer` write, or, for None, the whole
    residual stream as any layer reads it.  basis: [m, d], orthonormal rows.
    """

    basis: Tensor
    layer: int | None
