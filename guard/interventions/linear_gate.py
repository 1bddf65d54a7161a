"""A gate without a threshold: a rank-1 update of down_proj that reads the MLP's own neurons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..model.roles import decoder_layers, mlp_parts
from ..weight_edits import AddLowRank, FormOf
from .base import Intervention, MLPWrite, Reading, TextStates, at_least_float32, check_vector


@dataclass(frozen=True)
class LinearGate(Intervention):
    """Adds c (g.a) to what the MLP of `layer` writes: a gate without a threshold, read off the neurons a themselves.

    W a + c (g.a) = (W + c g^T) a: a rank-1 update of down_proj, which a LoRA adapter holds and a merge keeps. It never
    quite shuts; how much it says elsewhere is what is measured.  readout: g, [neurons].  column: c, [d].
    """

    kind = "linear-gate"
    asks = (AddLowRank,)
    adds = True
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

    @property
    def opens_on(self) -> Reading:
        return Reading(self.layer, self.readout, neurons=True)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": self.layer}

    def tensors(self) -> dict[str, Tensor]:
        return {"readout": self.readout, "column": self.column}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(int(header["layer"]), tensors["readout"], tensors["column"])

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """y <- y + c (g.a), y what the MLP returns, a its neurons. InputError if it has another number of neurons."""
        parts = mlp_parts(decoder_layers(model)[self.layer])
        if parts.down.in_features != len(self.readout):
            raise InputError(
                f"{self.kind}: reads {len(self.readout)} neurons, layer {self.layer} of the model has "
                f"{parts.down.in_features}"
            )
        writing = MLPWrite(parts, self.column)

        def read(_module: Any, args: tuple[Tensor, ...]) -> None:
            neurons = at_least_float32(args[0])
            writing.opened = neurons @ self.readout.to(neurons)

        yield parts.down.register_forward_pre_hook(read)
        yield from writing.hooks()

    def edits(self, form_of: FormOf) -> Iterable[AddLowRank]:
        return [AddLowRank(self.layer, self.column[:, None], self.readout[None])]
