"""Names on disk and parameters in memory: transformers 5 renames, stacks and turns what it loads; this asks it how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ...guard.base.errors import InputError
from .headers import DTYPES, QUANTISED, Checkpoint

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """How a parameter lies on disk: the tensors it is made of, and what transformers makes it of them with.

    disk: their names; one, unless they are stacked or joined.  operations: first to last; none if it is kept as it is.
    alone: whether nothing else is made of the same tensors.
    """

    disk: tuple[str, ...]
    operations: tuple[object, ...] = ()
    alone: bool = True

    def axis(self, axis: int, memory: Shape, shapes: Mapping[str, Shape]) -> int | None:
        """Returns the axis of each tensor on disk that is `axis` of the parameter, of shape `memory`; None if there is
        none.

        shapes: tensor's name on disk -> shape.
        """
        shape = memory
        for operation in reversed(self.operations):
            if isinstance(operation, Transpose):
                if operation.check_dims and shapes[self.disk[0]] == shape:
                    continue
                ends = [dim % len(shape) for dim in (operation.dim0, operation.dim1)]
                axis = dict(zip(ends, reversed(ends), strict=True)).get(axis, axis)
                turned = list(shape)
                turned[ends[0]], turned[ends[1]] = turned[ends[1]], turned[ends[0]]
                shape = tuple(turned)
            elif isinstance(operation, ErnieFuseAndSplitTextVisionExperts) and operation.stack_dim == 0 and axis > 0:
                return axis - 1  # each expert of either kind is a tensor of its own
            elif isinstance(operation, MergeModulelist) and operation.dim == 0 and axis > 0:
                axis, shape = axis - 1, shape[1:]
            elif not (isinstance(operation, Concatenate) and operation.dim % len(shape) != axis):
                return None
        return axis if self.alone else None


class Layout:
    """Every parameter and buffer of a checkpoint by its name in memory, as transformers would load it into `model`.

    stored: name in memory -> how it lies on disk.  shapes: name in memory -> the shape that what is on disk gives.
    tied: name in memory without a tensor -> the stored one that is the same parameter.  expected: the model's own
    names.  disk_shapes: tensor's name on disk -> shape, as it was given.  model: may be on meta.  Raises InputError
    naming the tensor if transformers could not convert it.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._model, self._state = model, model.state_dict(keep_vars=True)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._converter_of = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._groups: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
        self._group_of: dict[str, str] = {}
        self._doubles: list[tuple[str, str, str]] = []
        self._strangers: list[tuple[str, str]] = []
        self.expected = frozenset(self._state)
        self.disk_shapes = shapes
        self.stored: dict[str, Stored] = {}
        self.shapes: dict[str, Shape] = {}
        for disk in sorted(shapes, key=dot_natural_key):
            name, pattern = self._renamed(disk)
            if name not in self._state:
                self._strangers.append((disk, name))
            elif pattern is None:
                self._store(name, Stored((disk,)), shapes[disk])
            else:
                self._groups.setdefault(name, (self._converter_of[pattern], []))[1].append((disk, pattern))
        for first, (converter, sources) in self._groups.items():
            self._doubles += [(*pair, first) for pair in _twice(sources)]
            made = self._convert(first, lambda disk: torch.empty(shapes[disk], device="meta"))
            disks = tuple(disk for disk, _ in sources)
            for name, tensor in made.items():
                self._store(name, Stored(disks, tuple(converter.operations), len(made) == 1), tuple(tensor.shape))
                self._group_of[name] = first
        same = {id(self._state[name]): name for name in reversed(self.stored) if name in self._state}
        self.tied = {
            name: same[id(tensor)]
            for name, tensor in self._state.items()
            if name not in self.stored and id(tensor) in same
        }

    def _store(self, name: str, stored: Stored, shape: Shape) -> None:
        if name in self.stored:
            self._doubles.append((self.stored[name].disk[0], stored.disk[0], name))
        else:
            self.stored[name], self.shapes[name] = stored, shape

    def faults(self) -> Iterator[str]:
        """Returns what of the tensors on disk transformers would not load as they lie there, a line each.

        Two that are one parameter; one of another shape than the model's; parameters and buffers that get none, which
        it would fill with random numbers; and tensors that are nothing of the model's, unless its class expects them.
        """
        for one, other, name in self._doubles:
            yield (
                f"tensors {one!r} and {other!r} are both {name}, of which transformers takes one; "
                "leave one of them out (load and save_pretrained with transformers does)"
            )
        for name, shape in self.shapes.items():
            wanted = tuple(self._state[name].shape) if name in self._state else shape
            if shape != wanted:
                disk, *more = self.stored[name].disk
                has = f"has shape {list(self.disk_shapes[disk])}" if not more else f"and {len(more)} more are {name}"
                yield f"tensor {disk!r} {has}, config.json says {list(wanted)}"
        missing, strangers = self._unmatched()
        for name in missing:
            at_hand = f" ({strangers[0]!r} is none of the model's)" if strangers else ""
            at_hand += ", which config.json does not tie" if name in (self._model._tied_weights_keys or ()) else ""
            yield f"no tensor for {name}{at_hand}; transformers would fill it with random numbers"
        for disk in strangers:
            yield (
                f"tensor {disk!r} is none of the model's that config.json describes; transformers would leave it out: "
                "correct config.json, or remove the tensor"
            )

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises InputError naming the first of the faults, and what is no number of the kind that the model computes
        with, of `checkpoint`, whose tensors these are.
        """
        dtypes = (
            f"tensor {disk!r} is {checkpoint.info(disk).dtype}; {QUANTISED}"
            for name, stored in self.stored.items()
            if name in self._state and self._state[name].is_floating_point()
            for disk in stored.disk
            if not DTYPES[checkpoint.info(disk).dtype].is_floating_point
        )
        first, *others = [*self.faults(), *dtypes] or [""]
        if first:
            raise InputError(f"{checkpoint.folder}: {first}" + (f" (and {len(others)} more)" if others else ""))

    def _unmatched(self) -> tuple[list[str], list[str]]:
        """Returns (parameters and buffers in memory without a tensor, tensors on disk without a place in memory), but
        for what transformers expects to be left over.
        """
        found: Any = SimpleNamespace(missing_keys=set(), unexpected_keys={name for _, name in self._strangers})
        self._model._adjust_missing_and_unexpected_keys(found)
        missing = [name for name in self._state if name not in self.stored and name not in self.tied]
        return missing, [disk for disk, name in self._strangers if name in found.unexpected_keys]

    def _renamed(self, disk: str) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        found = rename_source_key(disk, self._renamings, self._converters, prefix, self._state)
        if found[0] not in self._state and disk in self._state:
            return rename_source_key(disk, [], [], prefix, self._state)
        return found

    def _convert(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        template, sources = self._groups[first]
        converter = deepcopy(template)
        for disk, pattern in sources:
            converter.add_tensor(first, disk, pattern, read(disk))  # type: ignore[arg-type]
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
        except Exception as error:  # foreign shapes can break a conversion in any way
            raise InputError(f"tensor {sources[0][0]!r}: transformers cannot make {first} of it ({error})") from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def assemble(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Parameter `name`, made of its tensors on disk, which `read` gives whole by their names."""
        stored = self.stored[name]
        return self._convert(self._group_of[name], read)[name] if stored.operations else read(stored.disk[0])

    def disk_name(self, memory: str, candidates: Iterable[str]) -> str | None:
        """Returns the first of `candidates` that transformers would load as `memory`, as it is."""
        return next((name for name in candidates if self._renamed(name) == (memory, None)), None)

    @property
    def plain_names(self) -> dict[str, str]:
        """Name in memory -> name on disk, of everything that is kept just as it is."""
        return {memory: stored.disk[0] for memory, stored in self.stored.items() if not stored.operations}

    def plain(self, memory: str) -> str | None:
        """Returns the one tensor on disk that is parameter `memory` just as it is; None if there is none."""
        stored = self.stored.get(memory)
        return stored.disk[0] if stored and not stored.operations else None


def _twice(sources: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Returns those of (tensor on disk, pattern that it matched) that are the same part of what they are joined to: the
    same pattern, and the same numbers (of layer and expert) in their names.
    """
    seen: dict[tuple[str, ...], str] = {}
    for disk, pattern in sources:
        part = (pattern, *filter(str.isdigit, disk.split(".")))
        if part in seen:
            yield seen[part], disk
        seen.setdefault(part, disk)
