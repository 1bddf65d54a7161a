"""Safety steering directions: SVD of paired harmful-minus-harmless states, layer by layer, and how well it separates.

Source: VLM-Guard (arXiv 2502.10486), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..base.errors import InputError
from ..model.vlm import VLM
from ..prompts.image_kinds import ANCHOR_KINDS, TEXT
from ..prompts.prompts import Anchors, Prompt
from .states import prompt_states


@dataclass(frozen=True)
class Directions:
    """What extraction found, layer by layer.

    bases: layer -> V_l, [m, d], row 0 = v_1, oriented so that harmful is the positive side.
    singular_values: layer -> all of A_l's, descending.  gap: layer -> mean of A_l . v_1, the residual stream's units.
    mean: layer -> mean of A_l, [d]: the steering vector, a difference of means.
    auc: image kind -> layer -> how well h . v_1 ranks harmful above harmless, cross-fitted over halves of the anchors
    (a direction is never scored on the pairs that it was fitted to).
    """

    bases: dict[int, Tensor]
    singular_values: dict[int, list[float]]
    gap: dict[int, float]
    auc: dict[str, dict[int, float]]
    mean: dict[int, Tensor] = field(default_factory=dict)

    def only(self, layers: Sequence[int]) -> Directions:
        """Returns the same for some of the layers."""
        auc = {kind: {layer: scores[layer] for layer in layers} for kind, scores in self.auc.items()}
        singular_values = {layer: self.singular_values[layer] for layer in layers}
        bases, mean = ({layer: each[layer] for layer in layers if layer in each} for each in (self.bases, self.mean))
        return Directions(bases, singular_values, {layer: self.gap[layer] for layer in layers}, auc, mean)

    def figures(self) -> dict[str, Any]:
        """Returns the figures as JSON, for provenance and report."""
        leading = {layer: values[:8] for layer, values in self.singular_values.items()}
        return {"singular_values": leading, "gap": self.gap, "auc": self.auc}


def steering_basis(differences: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns (V, S) of A = U S W^T: V = the top `rank` rows of W^T, oriented so that mean(A) . v >= 0; S descending.

    differences: A, [N, d], rows h(harmful_i) - h(harmless_i).  Returns V [rank, d] and S [min(N, d)], float32.
    """
    _, singular_values, w = torch.linalg.svd(differences.float(), full_matrices=False)
    basis = w[:rank]
    sign = torch.where(basis @ differences.float().mean(0) < 0, -1.0, 1.0)
    return basis * sign[:, None], singular_values


def auc(positives: Tensor, negatives: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs: area under the ROC curve (Mann-Whitney U)."""
    difference = positives[:, None] - negatives[None, :]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def cross_fitted_auc(text: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor]) -> float:
    """AUC of v_1: fitted to the text states (harmful, harmless) of one half, scored on the `seen` of the other."""
    scores = []
    for fold in (0, 1):
        basis, _ = steering_basis((text[0] - text[1])[fold::2], 1)
        scores.append(auc(*(states[1 - fold :: 2] @ basis[0] for states in seen)))
    return sum(scores) / 2


def extract(vlm: VLM, anchors: Anchors, layers: Sequence[int], rank: int = 1, *, every: bool = False) -> Directions:
    """Returns the safety steering directions of `layers` from `anchors`, text only; AUC under every kind of
    ANCHOR_KINDS too.

    every: whether `layers` are simply all there are. One whose last position sees no word of the question yet, as below
    a hybrid's first attention, then takes the directions of the next that does.  Raises InputError if rank exceeds the
    number of anchors or there are fewer than 4, if states are not finite, or if they do not differ.
    """
    if len(anchors) < 4:
        raise InputError(f"{len(anchors)} anchor pairs are too few: at least 4")
    if not 1 <= rank <= min(len(anchors), vlm.width):
        raise InputError(f"rank {rank}: must lie between 1 and the number of anchor pairs, {len(anchors)}")
    queries = [Prompt(text) for text in anchors.harmful + anchors.harmless]
    seen: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for kind in ANCHOR_KINDS:
        states = prompt_states(vlm, queries, layers, f"states, {kind}", kind)
        halves = {layer: state.split(len(anchors)) for layer, state in states.items()}
        seen[kind] = {layer: (harmful, harmless) for layer, (harmful, harmless) in halves.items()}
    differ = {layer: harmful - harmless for layer, (harmful, harmless) in seen[TEXT].items()}
    blind = [layer for layer, difference in differ.items() if not difference.any()]
    if blind and (len(blind) == len(differ) or not every):
        raise InputError(
            f"the anchors' harmful and harmless halves do not differ in the states of layer {blind[0]}; give anchors "
            "that do, or, of layers that see only a few words, leave it out of --layers"
        )
    sees = {layer: min(differ.keys() - blind, key=lambda each: (each < layer, abs(each - layer))) for layer in differ}
    fitted = {layer: steering_basis(differ[sees[layer]], rank) for layer in differ}
    return Directions(
        bases={layer: basis for layer, (basis, _) in fitted.items()},
        singular_values={layer: values.tolist() for layer, (_, values) in fitted.items()},
        gap={
            layer: float((harmful - harmless).mean(0) @ fitted[layer][0][0])
            for layer, (harmful, harmless) in seen[TEXT].items()
        },
        auc={
            kind: {layer: cross_fitted_auc(seen[TEXT][layer], states) for layer, states in per_layer.items()}
            for kind, per_layer in seen.items()
        },
        mean={layer: (harmful - harmless).mean(0) for layer, (harmful, harmless) in seen[TEXT].items()},
    )
