"""Residual writers found by looking: walk autograd backwards from the final norm's input, to every weight that wrote
it.

The walk passes through operations that do not mix the axis of the residual stream (additions, views, indexing, scalar
gates) and stops at what writes: a linear map, an embedding, a convolution, a parameter on its own. A norm on the way is
a post-norm: what lies behind it is written normed. Anything else on the way is reported, never guessed. It sees the
branches that were executed: give it one batch per modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...guard.base.errors import InputError, first_line
from ...guard.model.roles import final_norm

_PARAMETER = "torch::autograd::AccumulateGrad"

Node = Any
"""A node of autograd's graph: the backward of one operation, its inputs' nodes in `next_functions`."""


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies with: parameter `name` (None: nothing) plus `offset`, 1 where gains are zero-centred."""

    name: str | None
    offset: int = 0


@dataclass(frozen=True)
class Trace:
    """What writes to the residual stream of a model that was run.

    writers: parameter's name in memory -> the axis that is the residual stream's.  normed: writer -> the gain of the
    norm between it and the stream.  opaque: what lies between the stream and writers that no fold reaches, in words.
    """

    writers: Mapping[str, int]
    normed: Mapping[str, Gain]
    opaque: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """A tensor on the way: the node that made it, which of its outputs, its residual axis from the right (1)."""

    node: Node
    output: int
    axis: int
    width: int
    """d; where the axis is longer, states lie one after the other along it."""
    gain: Gain | None = None
    weight: bool = False
    """Whether the walk is inside the weight of a linear map that already stopped it."""

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape(self.node, self.output)


def trace(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Trace:
    """Returns the writers of `model`, from one forward pass for each of `batches`. Gradients are on; nothing is
    changed.

    Parameters that no pass reaches are not in it.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    buffers = [
        buffer for name, buffer in model.named_buffers() if buffer.is_floating_point() and "running_" not in name
    ]
    tensors = [*model.parameters(), *buffers]  # what is added and is no parameter is to be seen as well
    wanted = [tensor.requires_grad for tensor in tensors]
    found = _Found(names)
    read: list[Tensor] = []
    handle = final_norm(model).register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        for batch in batches:
            read.clear()
            try:
                with torch.enable_grad():
                    model(**batch, use_cache=False)
            except Exception as error:  # foreign code, or inputs that a class does not take, can fail in any way
                raise InputError(f"{type(model).__name__}: cannot be run to be traced ({first_line(error)})") from error
            found.walk(_Place(read[0].grad_fn, 0, 1, read[0].shape[-1]))
    finally:
        handle.remove()
        for tensor, before in zip(tensors, wanted, strict=True):
            tensor.requires_grad_(before)
    return Trace(found.writers, found.normed, tuple(sorted({*found.opaque, *_norms_of_sums(found.normed)})))


def _norms_of_sums(normed: Mapping[str, Gain]) -> Iterator[str]:
    """Returns a norm behind which several modules write: what one of them wrote is read by another before it is
    normed.
    """
    behind: dict[str | None, set[str]] = {}
    for name, gain in normed.items():
        behind.setdefault(gain.name, set()).add(name.rpartition(".")[0])
    for gain_name, modules in behind.items():
        if gain_name is not None and len(modules) > 1:
            yield f"{gain_name} norms the sum of what several modules write"


@dataclass
class _Found:
    names: Mapping[int, str]
    writers: dict[str, int] = field(default_factory=dict)
    normed: dict[str, Gain] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)

    def walk(self, start: _Place) -> None:
        seen, waiting = set(), [start]
        while waiting:
            place = waiting.pop()
            key = (id(place.node), place.output, place.axis, place.gain, place.weight)
            if place.node is None or key in seen:
                continue
            seen.add(key)
            waiting.extend(self._behind(place))

    def _behind(self, place: _Place) -> Iterator[_Place]:
        kind = place.node.name().removesuffix("0").removesuffix("1").removesuffix("Backward")
        if kind == "Add" and any(node is None for node, _ in place.node.next_functions) and not place.weight:
            self.opaque.add("something is added that is no parameter")
        if kind == _PARAMETER:
            self._record(place)
        elif kind == "Convolution" and place.node._saved_groups != 1:
            self.opaque.add("a convolution within each channel stands between the residual stream and what is written")
        elif kind in _WRITING and not place.weight:
            yield from (_step(place, child, axis, weight=True) for child, axis in _WRITING[kind](place))
        elif kind in ("Mul", "Div"):
            yield from self._product(place)
        elif kind in _PASSING:
            behind = _PASSING[kind](place)
            if behind is None:
                self.opaque.add(f"{kind} mixes the residual stream's axis with others")
            else:
                yield from (_step(place, child, axis) for child, axis in behind)
        else:
            self.opaque.add(f"{kind} stands between the residual stream and what is written")

    def _record(self, place: _Place) -> None:
        parameter = place.node.variable
        name = self.names.get(id(parameter))
        if name is None:
            self.opaque.add("something is added that is no parameter")
            return
        self.writers[name] = parameter.ndim - place.axis
        if place.gain is not None:
            self.normed[name] = place.gain

    def _gain(self, place: _Place, side: int) -> Gain | None:
        """Returns the gain that this factor of a product is, if it is one vector along the residual stream."""
        node, offset = place.node.next_functions[side][0], 0
        while node is not None and node.name() in _GAIN_STEPS:
            offset += node.name().startswith("Add")
            node = next((behind for behind, _ in node.next_functions if behind is not None), None)
        if node is None or node.name() != _PARAMETER or node.variable.ndim != 1 or place.axis != 1:
            return None
        return Gain(self.names.get(id(node.variable)), offset)

    def _product(self, place: _Place) -> Iterator[_Place]:
        sides = [side for side, (node, _) in enumerate(place.node.next_functions) if node]
        streams = [side for side in sides if not _is_scalar(place, side)]
        gains = {side: gain for side in streams if (gain := self._gain(place, side))}
        if len(streams) == 2 and len(gains) == 1:
            (side,) = gains
            if place.gain is not None:
                self.opaque.add("what is written is normed twice")
            yield _step(place, 1 - side, place.axis, gain=gains[side])
        elif len(streams) == 1 and 1 - streams[0] in sides:
            inverse_size = _is_norm(place.node.next_functions[1 - streams[0]][0])
            yield _step(place, streams[0], place.axis, gain=(place.gain or Gain(None)) if inverse_size else place.gain)
        elif len(streams) == 1 and _constant_scalar(place, 1 - streams[0]):
            yield _step(place, streams[0], place.axis)
        else:
            self.opaque.add("what is written is multiplied with a vector")


def _step(place: _Place, child: int, axis: int, gain: Gain | None = None, weight: bool = False) -> _Place:
    node, output = place.node.next_functions[child]
    return _Place(node, output, axis, place.width, place.gain if gain is None else gain, place.weight or weight)


def _shape(node: Node, output: int = 0) -> tuple[int, ...]:
    if node.name() == _PARAMETER:
        return tuple(node.variable.shape)
    return tuple(node._input_metadata[output].shape)


def _signed(dim: int) -> int:
    """Returns a dimension as autograd saved it: negative ones come as unsigned 64-bit numbers."""
    return dim - 2**64 if dim >= 2**63 else dim


def _from_right(dim: int, ndim: int) -> int:
    dim = _signed(dim)
    return ndim - (dim if dim >= 0 else dim + ndim)


def _is_scalar(place: _Place, side: int) -> bool:
    """Tells whether this factor is one number for the whole residual axis."""
    shape = _shape(*place.node.next_functions[side])
    return len(shape) < place.axis or (shape[-place.axis] == 1 and place.shape[-place.axis] != 1)


def _constant_scalar(place: _Place, side: int) -> bool:
    """Returns the same for a factor that takes no gradient; autograd keeps it where the other factor needs it."""
    constant = getattr(place.node, "_saved_other" if side == 1 else "_saved_self", None)
    if not isinstance(constant, Tensor):
        return True  # a Python number
    return constant.ndim < place.axis or constant.shape[-place.axis] == 1


def _is_norm(node: Node, depth: int = 4) -> bool:
    """Tells whether this factor is one over the size of something."""
    if node is None or depth == 0:
        return False
    inverse = node.name() == "PowBackward0" and node._saved_exponent < 0
    return (
        inverse
        or node.name() in ("RsqrtBackward0", "ReciprocalBackward0", "LinalgVectorNormBackward0")
        or any(_is_norm(child, depth - 1) for child, _ in node.next_functions)
    )


Behind = list[tuple[int, int]]
"""(child, its residual axis from the right)."""


def _all(place: _Place) -> Behind:
    return [(child, place.axis) for child in range(len(place.node.next_functions))]


def _first(place: _Place) -> Behind:
    return [(0, place.axis)]


def _transpose(place: _Place) -> Behind:
    ndim = len(place.shape)
    one, two = (_from_right(dim, ndim) for dim in (place.node._saved_dim0, place.node._saved_dim1))
    return [(0, {one: two, two: one}.get(place.axis, place.axis))]


def _flip(place: _Place) -> Behind:
    return [(0, 3 - place.axis)]


def _permute(place: _Place) -> Behind:
    ndim = len(place.shape)
    return [(0, _from_right(place.node._saved_dims[ndim - place.axis], ndim))]


def _view(place: _Place) -> Behind | None:
    """Returns the axis of the input that has the same size and as many entries before and after it."""
    after, before = place.shape, _shape(*place.node.next_functions[0])
    if place.axis == 1 and (before[-1] == place.width or before[-1] > place.width == after[-1]):
        return [(0, 1)]  # states one after the other, or each its own again
    at = len(after) - place.axis
    prefix, size = torch.Size(after[:at]).numel(), after[at]
    for axis in range(len(before)):
        if before[axis] == size and torch.Size(before[:axis]).numel() == prefix:
            return [(0, len(before) - axis)]
    return None


def _unsqueeze(place: _Place) -> Behind:
    added = _from_right(place.node._saved_dim, len(place.shape))
    return [(0, place.axis - (place.axis > added))]


def _removed(place: _Place) -> Behind | None:
    """Returns a dimension that the operation took away (select, squeeze, unbind, a sum that does not keep it)."""
    before = _shape(*place.node.next_functions[0])
    if len(before) == len(place.shape):
        return [(0, place.axis)]
    dim = place.node._saved_dim
    gone = [_from_right(given, len(before)) for given in (dim if isinstance(dim, tuple | list) else [dim])]
    axis = place.axis
    for removed in sorted(gone):
        axis += axis >= removed
    return [(0, axis)]


def _stack(place: _Place) -> Behind:
    added = _from_right(place.node._saved_dim, len(place.shape))
    return [(child, place.axis - (place.axis > added)) for child in range(len(place.node.next_functions))]


def _indexed(place: _Place) -> Behind | None:
    """Advanced indexing of leading dimensions."""
    before = _shape(*place.node.next_functions[0])
    if before[-1] == place.width and len(place.shape) == 1:
        return [(0, 1)]  # by a mask of every entry
    kept = before[-place.axis :] if len(before) >= place.axis else None
    return [(0, place.axis)] if kept == place.shape[-place.axis :] else None


_PASSING: dict[str, Callable[[_Place], Behind | None]] = {
    **dict.fromkeys(
        "Add Sub Cat Where IndexAdd IndexPut MaskedScatter Scatter ScatterAdd CopySlices IndexCopy "
        "IndexPutImpl SliceScatter SelectScatter Lerp".split(),
        _all,
    ),
    **dict.fromkeys(
        "Clone ToCopy Expand Repeat Slice Split SplitWithSizes Narrow Alias Detach Neg Roll Flip ConstantPadNd "
        "NativeDropout Dropout MaskedFill UpsampleBilinear2D UpsampleNearest2D UpsampleBicubic2D UpsampleBilinear2DAa "
        "UpsampleBicubic2DAa AvgPool2D AvgPool3D AdaptiveAvgPool2D AvgPool1D MaxPool2DWithIndices "
        "AsStrided Contiguous Chunk".split(),
        _first,
    ),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Reshape"), _view),
    **dict.fromkeys(("Select", "Squeeze", "Unbind", "Sum", "Mean"), _removed),
    **dict.fromkeys(("Index", "IndexSelect", "MaskedSelect"), _indexed),
    "Transpose": _transpose,
    "T": _flip,
    "Permute": _permute,
    "Unsqueeze": _unsqueeze,
    "Stack": _stack,
}

_WRITING: dict[str, Callable[[_Place], Behind]] = {
    "Addmm": lambda _place: [(0, 1), (2, 1)],
    "Mm": lambda _place: [(1, 1)],
    "Bmm": lambda _place: [(1, 1)],
    "Baddbmm": lambda _place: [(0, 1), (2, 1)],
    "Linear": lambda _place: [(1, 2), (2, 1)],
    "Embedding": lambda _place: [(0, 1)],
    "Convolution": lambda place: [(1, len(_shape(*place.node.next_functions[1]))), (2, 1)],
}

_GAIN_STEPS = ("AddBackward0", "ToCopyBackward0", "ViewBackward0", "UnsqueezeBackward0", "ExpandBackward0")


FILLED_WITH = 0.01
"""What a without_memory model's parameters are full of: any number that is neither 0 nor large."""


def without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Returns `model`, whose parameters are on meta, with one number for each parameter in their place. It runs, at any
    width, in the memory of its states; what it computes means nothing, but it computes it in the same order.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            filled = torch.full((), FILLED_WITH, dtype=torch.float32).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    return model
