"""Projection of the whole residual stream: one direction gone from everything that any norm reads.

Source: directional ablation, Arditi et al. 2024 (arXiv 2406.11717).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..model.roles import residual_readers
from ..weight_edits import FormOf, LeakSite, ProjectWrites
from .base import Intervention, TextStates, check_basis, check_strength, project_out


@dataclass(frozen=True)
class SharedProjection(Intervention):
    """Removes `strength` of span(basis) from the whole residual stream: from everything that any norm reads.

    basis: V, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind = "shared-projection"
    asks = (ProjectWrites,)
    erases_stream = True
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

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """h <- h - strength (h V^T) V wherever the stream is read; the stream itself is left as it is."""

        def project(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if args:
                return (project_out(args[0], self.basis, self.strength), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": project_out(kwargs["hidden_states"], self.basis, self.strength)}

        for reader in residual_readers(model):
            yield reader.register_forward_pre_hook(project, with_kwargs=True)

    def edits(self, form_of: FormOf) -> Iterable[ProjectWrites]:
        return [ProjectWrites(self.basis, self.strength, None)]

    def leak_sites(self) -> Iterable[LeakSite]:
        return [LeakSite(self.basis, None)] if self.strength == 1 else []
