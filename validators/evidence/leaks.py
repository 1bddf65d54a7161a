"""The leak detector: does anything still write along the projected directions?

Two views. Activations: in a running folded model, the component along V relative to the states it should be gone from,
which sees a writer that the table of writers forgot. Tensors: the component along V left in each edited tensor, which
sees a bias or gate that is too near zero to show in activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...export.checkpoint.edits import (
    AddProduct,
    Edit,
    Projecting,
    ProjectRows,
    SetColumns,
    row_blocks,
    taken,
    written_along,
)
from ...export.checkpoint.headers import DTYPES, Checkpoint, TensorInfo
from ...export.checkpoint.rounding import REPAIRED, Rounding
from ...guard.base.progress import track
from ...guard.guard import Guard
from ...guard.model.roles import MLP_NAMES, decoder_layers, final_norm, output_tensor, sublayers

EXACT_TOLERANCE = 1e-5
"""What float32 arithmetic may leave along V, relative to the states: measured 2e-8 to 4e-7."""


class Rows(Protocol):
    """What gives rows of tensors by name: a checkpoint, or what a checkpoint and its adapters come to."""

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Returns rows first:last of tensor `name`."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`: 2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16."""
    return torch.finfo(dtype).eps / 2


@dataclass
class Leaks:
    """Largest |h V^T| / |h| seen at each place, |h| the root mean square norm of the states at that place."""

    at: dict[str, float] = field(default_factory=dict)

    def record(self, place: str, states: Tensor, basis: Tensor) -> None:
        states = states.detach().to(torch.promote_types(states.dtype, torch.float32))
        along = (states @ basis.to(states).T).norm(dim=-1).max()
        scale = states.norm(dim=-1).square().mean().sqrt().clamp(min=torch.finfo(states.dtype).tiny)
        self.at[place] = max(self.at.get(place, 0.0), float(along / scale))

    @property
    def worst(self) -> float:
        return max(self.at.values(), default=0.0)


@contextmanager
def leak_probe(model: PreTrainedModel, guard: Guard) -> Iterator[Leaks]:
    """Records, while the block runs `model`, what is left along every full-strength projection of `guard`."""
    leaks, handles = Leaks(), []

    def watch_input(module: nn.Module, place: str, basis: Tensor) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            leaks.record(place, args[0] if args else kwargs["hidden_states"], basis)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def watch_output(module: nn.Module, place: str, basis: Tensor) -> None:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            leaks.record(place, output_tensor(output), basis)

        handles.append(module.register_forward_hook(hook))

    try:
        layers = decoder_layers(model)
        added = {layer for intervention in guard.interventions if intervention.adds for layer in intervention.layers}
        for site in (site for intervention in guard.interventions for site in intervention.leak_sites()):
            if site.layer is None:
                for number, layer in enumerate(layers):
                    watch_input(layer, f"into layer {number}", site.basis)
                watch_input(final_norm(model), "into the final norm", site.basis)
            else:
                for name, sublayer in sublayers(layers[site.layer]).items():
                    if site.layer not in added or name not in MLP_NAMES:  # what is added there is meant to stay
                        watch_output(sublayer, f"{name} of layer {site.layer}", site.basis)
        yield leaks
    finally:
        for handle in handles:
            handle.remove()


def activation_tolerance(dtypes: Sequence[str]) -> float:
    """Returns what may be left along V in activations of a checkpoint whose edited tensors have these dtypes.

    One unit roundoff: rounding leaves about a quarter of that, a forgotten writer at least 5.5e-3 (design figures,
    float16 1.1e-4, bfloat16 1.2e-3 of the states).
    """
    return max([EXACT_TOLERANCE, *(unit_roundoff(DTYPES[dtype]) for dtype in dtypes)])


def tensor_leak(source: Checkpoint, folded: Rows, name: str, edits: Sequence[Edit], edit: Projecting) -> float:
    """Returns what `edit`, one of `edits`, left of V in tensor `name` beyond the (1 - strength) it should, relative to
    before.

    |V W' - (1 - strength) V W| / max(|V W|, sqrt(m / d) |W|): 1 if nothing was projected, about the unit roundoff
    otherwise; the second term is the share that a random direction would have.  Columns that another edit replaces, and
    what a later one adds, are left out.  Reads both files in blocks of rows.
    """
    rank, width = edit.basis.shape
    place = next(number for number, other in enumerate(edits) if other is edit)
    replaced = {column for other in edits if isinstance(other, SetColumns) for column in other.columns}
    had = source.info(name).shape
    columns = [column for column in range(had[-1]) if column not in replaced] if len(had) > 1 else ...
    kept, old, squares = [], [], 0.0
    for first, last in row_blocks(had):
        before, after = (checkpoint.read(name, first, last)[..., columns].double() for checkpoint in (source, folded))
        for number, added in enumerate(edits):
            if not isinstance(added, AddProduct):
                continue
            right = added.right if added.right.ndim == 1 else added.right[..., columns]
            if number < place:  # what was added before is projected with the rest
                before = AddProduct(added.left, right).apply(before, first)
            else:
                after = AddProduct(-added.left, right).apply(after, first)
        kept.append(taken(edit, after - (1 - edit.strength) * before, first))
        old.append(taken(edit, before, first))
        squares += float(before.square().sum())
    scale = max(_size(edit, old), (rank / width * squares) ** 0.5)
    return _size(edit, kept) / scale if scale else 0.0


def _size(edit: Projecting, parts: list[Tensor]) -> float:
    """|V W| from its parts by block: summed over blocks of rows, or lying side by side."""
    whole = torch.stack(parts).sum(0) if isinstance(edit, ProjectRows) else torch.cat(parts)
    return float(whole.norm())


def tensor_leaks(source: Checkpoint, folded: Rows, edits: Mapping[str, Sequence[Edit]]) -> dict[str, float]:
    """Returns tensor -> tensor_leak, for every projected tensor."""
    return {
        name: max(tensor_leak(source, folded, name, edits_of, edit) for edit in projections)
        for name, edits_of in track(list(edits.items()), "leaks")
        if (projections := [edit for edit in edits_of if isinstance(edit, Projecting)])
    }


def tensor_tolerance(info: TensorInfo, edits: Sequence[Edit], rounding: Rounding) -> float:
    """Returns what rounding may leave in a tensor of this dtype and shape with these projections.

    nearest: its error is one of many random directions, hence 8 unit roundoffs.  repair: three times what is left of
    random weights and directions, about u m / d (measured, u / 10000 to u / 41 for d / m from 4096 to 16); more where
    few columns share the chance, eightfold in a bias.
    """
    u = unit_roundoff(DTYPES[info.dtype])
    along = written_along(edits)
    if rounding == "nearest" or along is None or info.dtype not in REPAIRED:
        return max(EXACT_TOLERANCE, 8 * u)
    rank, width = along[0].shape
    columns = max(1, math.prod(info.shape) // width)
    return max(EXACT_TOLERANCE, 3 * u * rank / width * (1 + 7 / columns))
