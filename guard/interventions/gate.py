"""The gated half of VLM-Guard in one pass: two neurons that recognise a harmful request and write the steering vector.

Sources: VLM-Guard (arXiv 2502.10486), step 3; the ramp of two rectified units, guard.md section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..fitting.calibration import Examples
from ..fitting.directions import auc
from ..fitting.linear_probe import OPENED, Detector, firing, opening
from ..fitting.transcripts import Place
from ..model.roles import decoder_layers, mlp_parts
from ..model.vlm import VLM
from ..weight_edits import FormOf, ReplaceNeurons
from .base import HARMLESS, Intervention, MLPWrite, Reading, TextStates, at_least_float32, check_vector

NEURONS = 2
"""What a gate takes: one neuron that opens the ramp at t0 and one that ends it at t1."""


@dataclass(frozen=True)
class Gate(Intervention):
    """Adds c * ramp to what the MLP of `layer` writes, at positions whose MLP input x the detector u recognises.

    With a biased MLP, ramp = (act(beta (u.x - t0)) - act(beta (u.x - t1))) / (beta (t1 - t0)), act the MLP's own
    activation: 0 below t0, 1 above t1, in between a line.  `unit` k stands in for the constant 1 where an MLP has no
    biases: gate rows beta (u - t0 k) and beta (u - t1 k), the whole times k.x where the MLP is gated; k.x is about 1
    where it matters (guard.md, section 6).  recycled: the MLP's neurons that are silenced to make room for the two.
    beta = inf is the ideal clip((u.x - t0) / (t1 - t0), 0, 1), which weights approach and do not hold.

    detector: u, [d], unit length.  column: c, [d].  unit: k, [d], or None where the MLP has biases.
    """

    kind = "gate"
    asks = (ReplaceNeurons,)
    adds = True
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

    @property
    def form(self) -> str:
        """`biased` or `bias-free`."""
        return "biased" if self.unit is None else "bias-free"

    @property
    def places(self) -> Mapping[int, tuple[int, ...]]:
        return {self.layer: self.recycled}

    @property
    def opens_on(self) -> Reading:
        return Reading(self.layer, self.detector)

    def describe(self) -> dict[str, Any]:
        numbers = {"layer": self.layer, "t0": self.t0, "t1": self.t1, "beta": self.beta}
        return {"kind": self.kind, **numbers, "recycled": list(self.recycled), "form": self.form}

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

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """y <- y + c ramp(x), y what the layer's MLP writes to the stream, with the recycled neurons silent."""
        parts = mlp_parts(decoder_layers(model)[self.layer])
        writing, silenced = MLPWrite(parts, self.column), list(self.recycled)

        def read(_module: Any, args: tuple[Tensor, ...]) -> None:
            writing.opened = ramp(args[0], self, parts.act, parts.gated)

        def silence(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            neurons = args[0].clone()
            neurons[..., silenced] = 0
            return (neurons, *args[1:])

        yield parts.gate.register_forward_pre_hook(read)
        if silenced:  # for whoever else reads the neurons as well, whenever it was attached
            yield parts.down.register_forward_pre_hook(silence, prepend=True)
        yield from writing.hooks()

    def edits(self, form_of: FormOf) -> Iterable[ReplaceNeurons]:
        """Two neurons, opening at t0 and closing at t1.

        gate, gate_bias: beta (u - t k) and 0, or beta u and -beta t where the MLP has biases.  up, up_bias: k / beta
        and 0, or 0 and 1 / beta.  down: +-c / (t1 - t0), times 1 / beta in a plain MLP (no up).
        """
        t = torch.tensor([self.t0, self.t1], dtype=torch.float64)
        u = self.detector.double().expand(NEURONS, -1)
        none, zero, sign = torch.zeros_like(t), torch.zeros_like(u), torch.tensor([[1.0], [-1.0]])
        height = 1.0 if form_of(self.layer).gated else self.beta
        down = sign * self.column.double() / (self.t1 - self.t0) / height
        if self.unit is None:
            rows = (self.beta * u, -self.beta * t, zero, torch.full_like(t, 1 / self.beta))
        else:
            k = self.unit.double().expand(NEURONS, -1)
            rows = (self.beta * (u - t[:, None] * k), none, k / self.beta, none)
        return [ReplaceNeurons(self.layer, self.recycled, *rows, down)]

    def held_out(self, vlm: VLM, examples: Examples) -> dict[str, Any]:
        """AUC against harmless prompts (last tokens alone: any detector of last tokens tells them from other
        positions) and share opened per image kind, where it fires besides, and how far its ramp is from the ideal clip
        for several beta (largest difference, of a height of 1).
        """
        everything = torch.cat([examples.positives, examples.other.x])
        harmless = examples.other.at(Place.LAST)
        detector = Detector(self.detector, self.t0, self.t1, self.unit)
        prompts = {**examples.harmful, HARMLESS: harmless}
        parts = mlp_parts(vlm.layers[self.layer])
        ideal = ramp(everything, replace(self, beta=math.inf), parts.act, parts.gated)
        betas = sorted({64.0, 256.0, 1024.0, self.beta})
        ramps = {beta: ramp(everything, replace(self, beta=beta), parts.act, parts.gated) for beta in betas}
        return {
            "auc": {kind: auc(x @ self.detector, harmless @ self.detector) for kind, x in examples.harmful.items()},
            "opens": {kind: float((opening(detector, x) > OPENED).double().mean()) for kind, x in prompts.items()},
            "fires_elsewhere": firing(detector, examples.other.but(Place.LAST)),
            "distance_to_clip": {f"{beta:g}": float((ramp - ideal).abs().max()) for beta, ramp in ramps.items()},
        }


def ramp(x: Tensor, gate: Gate, act: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    """Returns how far `gate` opens at MLP inputs `x` [..., d]: [...], 0 (shut) to 1 (open); float32 or better inside.

    act: the MLP's activation.  gated: whether the MLP multiplies its activation with a second linear map, so that
    without biases the ramp comes times k.x.
    """
    x = at_least_float32(x)
    score = x @ gate.detector.to(x)
    one = torch.ones_like(score) if gate.unit is None else x @ gate.unit.to(x)
    below, above = score - gate.t0 * one, score - gate.t1 * one
    if math.isinf(gate.beta):
        opened = below.relu() - above.relu()
    else:
        opened = (act(gate.beta * below) - act(gate.beta * above)) / gate.beta
    return opened / (gate.t1 - gate.t0) * (one if gated else 1.0)
