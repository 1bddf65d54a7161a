"""What every intervention offers: its data, its meaning as hooks, what it asks of weights, where it can leak."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..base.errors import InputError
from ..fitting.calibration import Examples
from ..fitting.directions import auc
from ..fitting.material import Material
from ..fitting.transcripts import Place
from ..model.roles import MLPParts, output_tensor, with_output_tensor
from ..model.vlm import VLM
from ..weight_edits import FormOf, LeakSite, WeightEdit

ORTHONORMAL_TOLERANCE = 1e-4
"""Largest |V V^T - I| accepted in a guard file; float32 SVD leaves about 1e-6."""

EXACTLY_ORTHONORMAL = 1e-14
"""Largest |V V^T - I| that float64 leaves."""

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of what dtype the tensors of a guard may be."""

TextStates = Mapping[int, Tensor]
"""layer -> h_l(q), [batch, d]: the last prompt token's states in a text-only pass (states.text_states)."""


@dataclass(frozen=True)
class Reading:
    """The linear reading that opens an intervention: `weights` . x, of the MLP of `layer`.

    weights: [d] for what the MLP reads; [neurons] for its neurons, where `neurons` is true.
    """

    layer: int
    weights: Tensor
    neurons: bool = False


HARMLESS, ELSEWHERE = "harmless prompts", "everything else"
"""What is read at the last tokens of harmless prompts, and at all other positions."""


def scores(reading: Reading, examples: Examples) -> dict[str, Tensor]:
    """Returns what is read of examples, [n] each: at the last tokens of harmful prompts by image kind, of harmless ones
    and everywhere else.
    """
    other = examples.other
    groups = {
        **{f"harmful, {kind}": x for kind, x in examples.harmful.items()},
        HARMLESS: other.at(Place.LAST),
        ELSEWHERE: other.but(Place.LAST).x,
    }
    return {name: x @ reading.weights for name, x in groups.items()}


class Intervention(ABC):
    """One change of what a model computes. A subclass is a frozen dataclass in a file of its own.

    Its hooks (`attach`) are its only meaning; `edits` is a claim about weights that the evidence holds to the hooks.
    """

    kind: ClassVar[str]
    """Its name in guard files."""

    asks: ClassVar[tuple[type[WeightEdit], ...]] = ()
    """The weight edits that it may ask for. None: only hooks run it, and graphs that they are traced into."""

    instead: ClassVar[str] = "export it with --format onnx, or use another --scope"
    """What can be done with it where weights do not hold it."""

    adds: ClassVar[bool] = False
    """Whether it adds something to the residual stream that is meant to stay there."""

    erases_stream: ClassVar[bool] = False
    """Whether it takes something out of the whole stream, whatever writes it and when."""

    @property
    @abstractmethod
    def layers(self) -> list[int]:
        """The layers that it names, ascending; none if it acts on all alike."""

    @property
    @abstractmethod
    def width(self) -> int:
        """d, the hidden size of the model that it was made for."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the manifest and the guard file say of it: JSON with its `kind`, no tensors."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, as the guard file holds them."""

    @classmethod
    @abstractmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The intervention that gave `header` and `tensors`. InputError, KeyError or ValueError if they are unsound."""

    @abstractmethod
    def attach(self, model: PreTrainedModel, text: TextStates | None) -> Iterator[RemovableHandle]:
        """Registers the hooks that make `model` compute it. text: for interventions with `text_layers`."""

    def edits(self, form_of: FormOf) -> Iterable[WeightEdit]:
        """Returns what it asks of weights. InputError, naming the kind and the reason, if weights cannot hold it."""
        raise InputError(f"{self.kind}: weights cannot hold it; {self.instead}")

    @property
    def places(self) -> Mapping[int, tuple[int, ...]]:
        """Layer -> the MLP's neurons that it overwrites. No two interventions may overwrite the same."""
        return {}

    @property
    def text_layers(self) -> list[int]:
        """The layers whose states in a second, text-only pass its hooks need."""
        return []

    @property
    def opens_on(self) -> Reading | None:
        """What it reads to decide how far it acts; None if it acts alike everywhere."""
        return None

    def leak_sites(self) -> Iterable[LeakSite]:
        """Where nothing may be left of what it takes out in full."""
        return ()

    def held_out(self, vlm: VLM, examples: Examples) -> dict[str, Any]:
        """Returns what `opens_on` does on examples that it was not fitted to, as JSON: `auc` by image kind, and what
        else tells how well it opens.
        """
        reading = self.opens_on
        assert reading is not None, "asked of what opens on nothing"
        groups = scores(reading, examples)
        harmless = groups[HARMLESS]
        return {
            "auc": {kind: auc(groups[f"harmful, {kind}"], harmless) for kind in examples.harmful},
            "opens": {name: [float(score.mean()), float(score.std())] for name, score in groups.items()},
        }

    @classmethod
    def candidates(cls, material: Material) -> Iterable[Candidate]:
        """Returns what `--guard KIND` chooses among; nothing where the kind is no guard by itself."""
        return ()


@dataclass(frozen=True)
class Candidate:
    """Interventions to choose among, with the settings that tell them apart (JSON)."""

    interventions: tuple[Intervention, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


class PerLayer(Intervention):
    """An intervention with a basis of its own in each layer that it names."""

    bases: Mapping[int, Tensor]

    @property
    def layers(self) -> list[int]:
        return list(self.bases)

    @property
    def width(self) -> int:
        return next(iter(self.bases.values())).shape[1]

    @property
    def ranks(self) -> dict[int, int]:
        return {layer: len(basis) for layer, basis in self.bases.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {str(layer): basis for layer, basis in self.bases.items()}


class MLPWrite:
    """Adds `opened`, [...], which a reading hook sets, times `column`, [d], to what a layer's MLP writes to the stream.

    In a mixture of experts `opened` stands for the shared expert, whose share of the output is applied. The hook sits
    on the whole MLP, so that it acts after what an earlier intervention took out there, as in weights.
    """

    def __init__(self, parts: MLPParts, column: Tensor) -> None:
        self.parts, self.column = parts, column
        self.opened, self.share = torch.zeros(()), torch.ones(())

    def hooks(self) -> Iterator[RemovableHandle]:
        if self.parts.share is not None:
            yield self.parts.share.register_forward_hook(self._weigh)
        yield self.parts.sublayer.register_forward_hook(on_output(self._write))

    def _weigh(self, _module: Any, _args: Any, output: Tensor) -> None:
        self.share = at_least_float32(output).sigmoid()

    def _write(self, output: Tensor) -> Tensor:
        added = self.opened[..., None] * self.share.to(self.opened) * self.column.to(self.opened)
        return (output + added.reshape(output.shape)).to(output.dtype)


def on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Returns a forward hook that puts `change` of a module's hidden states in their place."""
    return lambda _module, _args, output: with_output_tensor(output, change(output_tensor(output)))


def at_least_float32(states: Tensor) -> Tensor:
    """Returns `states` in float32 or better."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def project_out(states: Tensor, basis: Tensor, strength: float) -> Tensor:
    """h - strength (h V^T) V: `states` [..., d] without that share of span(basis), [m, d]; float32 or better inside."""
    wide = at_least_float32(states)
    basis = basis.to(wide)
    return (wide - strength * (wide @ basis.T) @ basis).to(states.dtype)


def _as(dtype: torch.dtype, tensor: Tensor, where: str) -> Tensor:
    """Returns `tensor` on the CPU in `dtype`. InputError unless it is of one of FLOATS."""
    if tensor.dtype not in FLOATS:
        raise InputError(f"{where}: a {tensor.dtype} tensor, where {', '.join(map(str, FLOATS))} are taken")
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous()


def check_basis(basis: Tensor, where: str) -> Tensor:
    """Returns `basis` [m, d] in float64, its rows orthonormal to the last place, after checking that they are so to
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
    """Returns `bases` (layer -> V_l) in the order of layers after check_basis, if all have one width;
    InputError else.
    """
    checked = {layer: check_basis(bases[layer], f"{where}, layer {layer}") for layer in sorted(bases)}
    if len({basis.shape[1] for basis in checked.values()}) != 1:
        raise InputError(f"{where}: no layers, or directions of unequal width")
    return checked


def check_strength(strength: float, where: str) -> float:
    """Returns `strength` after checking that it lies in (0, 1]; InputError otherwise."""
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InputError(f"{where}: strength {strength!r} is not in (0, 1]")
    return float(strength)


def check_vector(vector: Tensor, where: str) -> Tensor:
    """Returns `vector` [d] in float32 after checking that it is finite; InputError otherwise."""
    vector = _as(torch.float32, vector, where)
    if vector.ndim != 1 or not torch.isfinite(vector).all():
        raise InputError(f"{where}: not a finite vector")
    return vector


def parse_bases(tensors: Mapping[str, Tensor], where: str) -> dict[int, Tensor]:
    """Returns layer -> tensor, of tensors named by the number of their layer. InputError for any other name."""
    for key in tensors:
        if not key.isdecimal():
            raise InputError(f"{where}: {key!r} is not a layer number")
    return {int(key): tensor for key, tensor in tensors.items()}
