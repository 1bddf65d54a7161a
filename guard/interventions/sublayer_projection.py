"""Projection of what attention and MLP write: VLM-Guard's step 2 in weights; on its own, refusal ablation.

Sources: VLM-Guard (arXiv 2502.10486); weight orthogonalisation, Arditi et al. 2024 (arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..model.roles import decoder_layers, sublayers
from ..weight_edits import FormOf, LeakSite, ProjectWrites
from .base import PerLayer, TextStates, check_bases, check_strength, on_output, parse_bases, project_out


@dataclass(frozen=True)
class SublayerProjection(PerLayer):
    """Removes `strength` of span(bases[l]) from what the attention and the MLP of layer l write.

    bases: layer (0-indexed) -> V_l, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind = "sublayer-projection"
    asks = (ProjectWrites,)
    bases: Mapping[int, Tensor]
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", check_bases(self.bases, self.kind))
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "strength": self.strength, "ranks": self.ranks}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(parse_bases(tensors, cls.kind), header["strength"])

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """y <- y - strength (y V_l^T) V_l, y what a sublayer of layer l returns."""
        for layer, basis in self.bases.items():
            hook = on_output(lambda y, basis=basis: project_out(y, basis, self.strength))  # type: ignore[misc]
            for module in sublayers(decoder_layers(model)[layer]).values():
                yield module.register_forward_hook(hook)

    def edits(self, form_of: FormOf) -> Iterable[ProjectWrites]:
        return [ProjectWrites(basis, self.strength, layer) for layer, basis in self.bases.items()]

    def leak_sites(self) -> Iterable[LeakSite]:
        return [LeakSite(basis, layer) for layer, basis in self.bases.items() if self.strength == 1]
