"""Interventions: what a guard changes, as data. hooks.py says what each means, export/fold.py what it is in weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..base.errors import InputError

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest |V V^T - I| accepted in a guard file; float32 SVD leaves about 1e-6."""

EXACTLY_ORTHONORMAL = 1e-14
"""Largest |V V^T - I| that float64 leaves."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of what dtype the tensors of a guard may be."""

NEURONS = 2
"""What a gate takes: one neuron that opens the ramp at t0 and one that ends it at t1."""


def _as(dtype: torch.dtype, tensor: Tensor, where: str) -> Tensor:
    """`tensor` on the CPU in `dtype`. InputError unless it is of one of FLOATS."""
    if tensor.dtype not in FLOATS:
        raise InputError(f"{where}: a {tensor.dtype} tensor, where {', '.join(map(str, FLOATS))} are taken")
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


def check_basis(basis: Tensor, where: str) -> Tensor:
    """`basis` [m, d] in float64, its rows orthonormal to the last place, after checking that they are so to
    ORTHONORMAL_TOLERANCE; InputError otherwise.

    What a float32 basis lacks, the nearest orthonormal one replaces: (V V^T)^(-1/2) V. A projection that is applied
    where many tensors write is then the same as one applied where they are read.
    """
    basis = _as(torch.float64, basis, where)
    if basis.ndim != 2 or not 0 < basis.shape[0] <= basis.shape[1]:
        raise InputError(f"{where}: shape {list(basis.shape)} is not [m, d] with 0 < m <= d")
    if not torch.isfinite(basis).all():
        raise InputError(f"{where}: NaN or Inf in the basis")
    gram = basis @ basis.T
    error = (gram - torch.eye(len(basis), dtype=gram.dtype)).abs().max()
    if error > ORTHONORMAL_TOLERANCE:
        raise InputError(f"{where}: rows are not orthonormal")
    if error <= EXACTLY_ORTHONORMAL:
        return basis
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.rsqrt()) @ vectors.T @ basis


def check_bases(bases: Mapping[int, Tensor], where: str) -> dict[int, Tensor]:
    """`bases` (layer -> V_l) in the order of layers after check_basis, if all have one width; InputError else."""
    checked = {layer: check_basis(bases[layer], f"{where}, layer {layer}") for layer in sorted(bases)}
    if len({basis.shape[1] for basis in checked.values()}) != 1:
        raise InputError(f"{where}: no layers, or directions of unequal width")
    return checked


def check_strength(strength: float, where: str) -> float:
    """`strength` after checking that it lies in (0, 1]; InputError otherwise."""
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InputError(f"{where}: strength {strength!r} is not in (0, 1]")
    return float(strength)


def check_vector(vector: Tensor, where: str) -> Tensor:
    """`vector` [d] in float32 after checking that it is finite; InputError otherwise."""
    vector = _as(torch.float32, vector, where)
    if vector.ndim != 1 or not torch.isfinite(vector).all():
        raise InputError(f"{where}: not a finite vector")
    return vector


def _layer_number(key: str, where: str) -> int:
    if not key.isdecimal():
        raise InputError(f"{where}: {key!r} is not a layer number")
    return int(key)


class _PerLayer:
    """What interventions with a basis of their own in each layer have in common."""

    in_weights: ClassVar[bool] = True
    bases: Mapping[int, Tensor]

    @property
    def layers(self) -> list[int]:
        return list(self.bases)

    @property
    def width(self) -> int:
        return next(iter(self.bases.values())).shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {str(layer): basis for layer, basis in self.bases.items()}


@dataclass(frozen=True)
class SublayerProjection(_PerLayer):
    """Removes `strength` of span(bases[l]) from what the attention and the MLP of layer l write.

    bases: layer (0-indexed) -> V_l, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind: ClassVar[str] = "sublayer-projection"
    bases: Mapping[int, Tensor]
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", check_bases(self.bases, self.kind))
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))

    def describe(self) -> dict[str, Any]:
        """What the manifest and the guard file say of it: JSON, no tensors."""
        ranks = {layer: len(basis) for layer, basis in self.bases.items()}
        return {"kind": self.kind, "strength": self.strength, "ranks": ranks}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        bases = {_layer_number(key, cls.kind): tensor for key, tensor in tensors.items()}
        return cls(bases, header["strength"])


@dataclass(frozen=True)
class SharedProjection:
    """Removes `strength` of span(basis) from the whole residual stream: from everything that any norm reads.

    basis: V, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind: ClassVar[str] = "shared-projection"
    in_weights: ClassVar[bool] = True
    basis: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", check_basis(self.basis, self.kind))
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))

    @property
    def layers(self) -> list[int]:
        return []

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "strength": self.strength, "rank": len(self.basis)}

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["basis"], header["strength"])


@dataclass(frozen=True)
class TwoPass(_PerLayer):
    """VLM-Guard's step 3 as published: a text-only pass decides, per layer, whether to steer the last prompt token.

    h*_l(Q) = h'_l(Q) + alpha g_l h_l(q) V_l^T V_l with g_l = 1[h_l(q) . v_1 > 0]; h' = h - h V_l^T V_l if `project`,
    else h.  bases: layer -> V_l, [m, d], orthonormal rows, row 0 = v_1.  Hooks only: no weights hold a second pass.
    """

    kind: ClassVar[str] = "two-pass"
    in_weights: ClassVar[bool] = False
    bases: Mapping[int, Tensor]
    alpha: float = 1.0
    project: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", check_bases(self.bases, self.kind))
        object.__setattr__(self, "alpha", float(self.alpha))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "alpha": self.alpha, "project": self.project, "layers": self.layers}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        bases = {_layer_number(key, cls.kind): tensor for key, tensor in tensors.items()}
        return cls(bases, float(header["alpha"]), bool(header["project"]))


@dataclass(frozen=True)
class ResidualProjection(_PerLayer):
    """VLM-Guard's steps 2 and 3 in one pass, on the residual stream after layer l, each position deciding for itself.

    h*_l = h_l - strength h_l V_l^T V_l + alpha g_l h_l V_l^T V_l with g_l = 1[h_l . v_1 > 0]; alpha = 0 is the ungated
    form.  bases: layer -> V_l, [m, d], orthonormal rows, row 0 = v_1.  strength: in (0, 1].  alpha: finite, >= 0.
    Weights do not hold it: the skip connection carries what earlier layers wrote past every weight of layer l.
    """

    kind: ClassVar[str] = "residual-projection"
    in_weights: ClassVar[bool] = False
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
        numbers = {"strength": self.strength, "alpha": self.alpha}
        return {"kind": self.kind, **numbers, "ranks": {layer: len(basis) for layer, basis in self.bases.items()}}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        bases = {_layer_number(key, cls.kind): tensor for key, tensor in tensors.items()}
        return cls(bases, header["strength"], header["alpha"])


@dataclass(frozen=True)
class Gate:
    """Adds c * ramp to what the MLP of `layer` writes, at positions whose MLP input x the detector u recognises.

    With a biased MLP, ramp = (act(beta (u.x - t0)) - act(beta (u.x - t1))) / (beta (t1 - t0)), act the MLP's own
    activation: 0 below t0, 1 above t1, in between a line.  `unit` k stands in for the constant 1 where an MLP has no
    biases: gate rows beta (u - t0 k) and beta (u - t1 k), the whole times k.x where the MLP is gated; k.x is about 1
    where it matters (guard.md, section 6).  recycled: the MLP's neurons that are silenced to make room for the two.
    beta = inf is the ideal clip((u.x - t0) / (t1 - t0), 0, 1), which weights approach and do not hold.

    detector: u, [d], unit length.  column: c, [d].  unit: k, [d], or None where the MLP has biases.
    """

    kind: ClassVar[str] = "gate"
    in_weights: ClassVar[bool] = True
    layer: int
    detector: Tensor
    column: Tensor
    t0: float
    t1: float
    unit: Tensor | None = None
    recycled: tuple[int, ...] = ()
    beta: float = 256.0

    def __post_init__(self) -> None:
        for name in ("detector", "column", "unit"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_vector(value, f"{self.kind}, {name}"))
        for name in ("t0", "t1", "beta"):
            object.__setattr__(self, name, float(getattr(self, name)))
        shapes = {vector.shape for vector in (self.detector, self.column, self.unit) if vector is not None}
        if len(shapes) != 1:
            raise InputError(f"{self.kind}: detector, column and unit are not of one size")
        if not (math.isfinite(self.t0) and math.isfinite(self.t1) and self.t0 < self.t1):
            raise InputError(f"{self.kind}: thresholds t0 = {self.t0} and t1 = {self.t1} are not t0 < t1")
        if not self.beta > 0:
            raise InputError(f"{self.kind}: beta {self.beta} is not positive")
        if self.layer < 0 or len(set(self.recycled)) != len(self.recycled) or min(self.recycled, default=0) < 0:
            raise InputError(f"{self.kind}: layer {self.layer}, recycled neurons {list(self.recycled)} make no sense")
        if len(self.recycled) not in (0, NEURONS):
            raise InputError(f"{self.kind}: takes {NEURONS} recycled neurons, or none where the MLP is widened")

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    @property
    def width(self) -> int:
        return len(self.detector)

    def describe(self) -> dict[str, Any]:
        numbers = {"layer": self.layer, "t0": self.t0, "t1": self.t1, "beta": self.beta}
        return {"kind": self.kind, **numbers, "recycled": list(self.recycled), "form": self.form}

    @property
    def form(self) -> str:
        """`biased` or `bias-free`."""
        return "biased" if self.unit is None else "bias-free"

    def tensors(self) -> dict[str, Tensor]:
        vectors = {"detector": self.detector, "column": self.column}
        return vectors if self.unit is None else {**vectors, "unit": self.unit}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        numbers = {name: float(header[name]) for name in ("t0", "t1", "beta")}
        recycled = tuple(int(neuron) for neuron in header["recycled"])
        unit = tensors.get("unit")
        return cls(
            int(header["layer"]), tensors["detector"], tensors["column"], unit=unit, recycled=recycled, **numbers
        )


@dataclass(frozen=True)
class LinearGate:
    """Adds c (g.a) to what the MLP of `layer` writes: a gate without a threshold, read off the neurons a themselves.

    W a + c (g.a) = (W + c g^T) a: a rank-1 update of down_proj, which a LoRA adapter holds and a merge keeps. It never
    quite shuts; how much it says elsewhere is what is measured.  readout: g, [neurons].  column: c, [d].
    """

    kind: ClassVar[str] = "linear-gate"
    in_weights: ClassVar[bool] = True
    layer: int
    readout: Tensor
    column: Tensor

    def __post_init__(self) -> None:
        for name in ("readout", "column"):
            object.__setattr__(self, name, check_vector(getattr(self, name), f"{self.kind}, {name}"))
        if self.layer < 0:
            raise InputError(f"{self.kind}: layer {self.layer} makes no sense")

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    @property
    def width(self) -> int:
        return len(self.column)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": self.layer}

    def tensors(self) -> dict[str, Tensor]:
        return {"readout": self.readout, "column": self.column}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(int(header["layer"]), tensors["readout"], tensors["column"])
