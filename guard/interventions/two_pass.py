"""VLM-Guard's step 3 as published, with its second, text-only pass: the reference that weights are measured against.

Source: VLM-Guard (arXiv 2502.10486), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..model.roles import decoder_layers
from .base import PerLayer, TextStates, check_bases, on_output, parse_bases, project_out


@dataclass(frozen=True)
class TwoPass(PerLayer):
    """VLM-Guard's step 3 as published: a text-only pass decides, per layer, whether to steer the last prompt token.

    h*_l(Q) = h'_l(Q) + alpha g_l h_l(q) V_l^T V_l with g_l = 1[h_l(q) . v_1 > 0]; h' = h - h V_l^T V_l if `project`,
    else h.  bases: layer -> V_l, [m, d], orthonormal rows, row 0 = v_1.  Hooks only: no weights hold a second pass.
    """

    kind = "two-pass"
    instead = "only hooks run it"
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
        return cls(parse_bases(tensors, cls.kind), float(header["alpha"]), bool(header["project"]))

    @property
    def text_layers(self) -> list[int]:
        return self.layers

    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """Adds alpha g_l h_l(q) V_l^T V_l to what decoder layer l returns at the last prompt token. One batch only.

        text: h_l(q) of that batch for every layer; InputError without.
        """
        if text is None:
            raise InputError(
                "the two-pass guard needs the text-only states of the batch: attached(model, guard, text=...)"
            )
        for layer, basis in self.bases.items():
            wide = text[layer].float()
            steered = wide @ basis.T.to(wide)  # [batch, m]: h_l(q) V^T
            gate = (steered[:, :1] > 0).float()  # g_l, [batch, 1]
            change = _LastPromptToken(basis, self, gate * steered)
            yield decoder_layers(model)[layer].register_forward_hook(on_output(change))


class _LastPromptToken:
    """Adds alpha g_l h_l(q) V^T V at the last prompt token: in the prefill, not in the cached steps that follow it.

    The first call sees the whole (left-padded) prompt and so tells where its last token is; without a KV cache every
    later call repeats that position, with one it does not reach it again.
    """

    def __init__(self, basis: Tensor, guard: TwoPass, coefficients: Tensor) -> None:
        self.basis, self.guard, self.coefficients = basis, guard, coefficients
        self.position: int | None = None

    def __call__(self, states: Tensor) -> Tensor:
        if self.position is None:
            self.position = states.shape[1] - 1
        if self.guard.project:
            states = project_out(states, self.basis, 1.0)
        if states.shape[1] <= self.position:
            return states
        states = states.clone()
        steering = self.guard.alpha * self.coefficients @ self.basis.to(self.coefficients)  # [batch, d]
        states[:, self.position] += steering.to(states)
        return states
