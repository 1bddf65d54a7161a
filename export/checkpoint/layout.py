"""Names on disk and parameters in memory: transformers 5 renames, stacks and turns what it loads; this asks it how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

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
        """The axis of each tensor on disk that is `axis` of the parameter, of shape `memory`; None if there is none.

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
    disk_shapes: tensor's name on disk -> shape, as it was given.  model: may be on meta.  Raises InputError naming the
    tensor if transformers could not convert it.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, Shape]) -> None:
        transforms = get_model_conversion_mapping(model)
        self._model, self._state = model, model.state_dict(keep_vars=True)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._groups: dict[str, tuple[WeightConverter, list[tuple[str, str]]]] = {}
        self._group_of: dict[str, str] = {}
        self.disk_shapes = shapes
        self.stored: dict[str, Stored] = {}
        self.shapes: dict[str, Shape] = {}
        for disk in sorted(shapes, key=dot_natural_key):
            name, pattern = self._renamed(disk)
            if name not in self._state:
                continue
            if pattern is None:
                self.stored[name], self.shapes[name] = Stored((disk,)), shapes[disk]
            else:
                converter = next(each for each in self._converters if pattern in each.source_patterns)
                self._groups.setdefault(name, (converter, []))[1].append((disk, pattern))
        for first, (converter, sources) in self._groups.items():
            made = self._convert(first, lambda disk: torch.empty(shapes[disk], device="meta"))
            for name, tensor in made.items():
                self.shapes[name] = tuple(tensor.shape)
                disks = tuple(disk for disk, _ in sources)
                self.stored[name] = Stored(disks, tuple(converter.operations), len(made) == 1)
                self._group_of[name] = first

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
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}

    def assemble(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Parameter `name`, made of its tensors on disk, which `read` gives whole by their names."""
        stored = self.stored[name]
        return self._convert(self._group_of[name], read)[name] if stored.operations else read(stored.disk[0])

    def disk_name(self, memory: str, candidates: Iterable[str]) -> str | None:
        """The first of `candidates` that transformers would load as `memory`, as it is."""
        return next((name for name in candidates if self._renamed(name) == (memory, None)), None)

    @property
    def plain_names(self) -> dict[str, str]:
        """Name in memory -> name on disk, of everything that is kept just as it is."""
        return {memory: stored.disk[0] for memory, stored in self.stored.items() if not stored.operations}

    def plain(self, memory: str) -> str | None:
        """The one tensor on disk that is parameter `memory` just as it is; None if there is none."""
        stored = self.stored.get(memory)
        return stored.disk[0] if stored and not stored.operations else None
