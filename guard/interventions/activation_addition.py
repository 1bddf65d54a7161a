"""Activation addition: a steering vector added to what one MLP writes, at every position.

Sources: Turner et al. 2023 (arXiv 2308.10248); contrastive activation addition, Rimsky et al. 2023 (arXiv 2312.06681).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..fitting.material import Material
from ..model.roles import decoder_layers, mlp_parts
from ..weight_edits import AddBias, FormOf
from .base import Candidate, Intervention, TextStates, check_vector, on_output

ADDITION_GAINS = (0.25, 0.5, 1.0)
"""Multiples of the difference of means that are tried."""


@dataclass(frozen=True)
class ActivationAddition(Intervention):
    """Adds a steering vector v to what the MLP of `layer` writes, whatever it reads: h <- h + v.

    vector: v, [d].  A bias of the MLP's last linear map; exact where it has one, or the config can give it one.
    """

    kind = "activation-addition"
    asks = (AddBias,)
    instead = "export it with --format onnx"
    adds = True
    layer: int
    vector: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", check_vector(self.vector, self.kind))
        if self.layer < 0:
            raise InputError(f"{self.kind}: layer {self.layer} makes no sense")

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    @property
    def width(self) -> int:
        return len(self.vector)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": self.layer}

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(int(header["layer"]), tensors["vector"])

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """y <- y + v, y what the layer's MLP writes to the stream."""
        add = on_output(lambda y: y + self.vector.to(y))
        yield mlp_parts(decoder_layers(model)[self.layer]).sublayer.register_forward_hook(add)

    def edits(self, form_of: FormOf) -> Iterable[AddBias]:
        return [AddBias(self.layer, self.vector)]

    @classmethod
    def candidates(cls, material: Material) -> Iterable[Candidate]:
        """Multiples of the mean harmful-minus-harmless difference, layer by layer."""
        for layer in material.tried:
            for gain in ADDITION_GAINS:
                vector = gain * material.directions.mean[layer]
                yield Candidate((cls(layer, vector),), {"layer": layer, "gain": gain})
