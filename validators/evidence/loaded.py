"""What plain transformers loads from a folder, value by value, against what is read from it here: there is one reader.

`from_pretrained` loads the folder, with no options of ours, by its own rules: which files, which tensor is which
parameter, what is done to it. Each value is compared, bit for bit, as it is put into the model, and dropped, so that
memory does not grow with the model: torch tells of every parameter that a module is given, and takes another in its
place; transformers leaves what comes next on the disk until it is wanted, if it is told not to load ahead. A small
model keeps its values, and they are compared again when it is finished.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

from ...export.checkpoint.headers import DTYPES, Checkpoint
from ...export.checkpoint.layout import Layout
from ...export.checkpoint.memory import drop_mapped, map_blocks_from, same_bits
from ...guard.base.errors import InputError, first_line
from ...guard.base.progress import bar
from ...guard.base.remote_code import trusted
from ...guard.model.vlm import auto_class, meta_model

COMPARE_BYTES = 4 * 2**20
"""Compared at a time."""

KEEP_BELOW_BYTES = 256 * 2**20
"""Checkpoints up to this size are small."""

LET_GO_BYTES = 64 * 2**20
"""After which what transformers has mapped and was compared leaves the memory."""

NO_LOADING_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"
"""Set to 1, transformers reads a tensor when it is its turn."""

REARRANGING = (Concatenate, MergeModulelist, Transpose)
"""Conversions that leave every number as it is."""

Origins = Mapping[str, tuple[Checkpoint, str]]
"""Tensor's name on disk -> the checkpoint and the tensor that it shall be a copy of."""


@dataclass(frozen=True)
class Loaded:
    """count: values compared.  copies: tensors on disk that transformers loads uncast and whose bytes are those of
    their origins.  failures: what is loaded otherwise than it is read here, a line each.
    """

    count: int
    copies: frozenset[str]
    failures: tuple[str, ...]


def check_loaded(checkpoint: Checkpoint) -> None:
    """InputError, naming the tensor, unless transformers loads from the folder of `checkpoint` what is read here."""
    for failure in compare_loaded(checkpoint).failures:
        raise InputError(f"{checkpoint.folder}: {failure}")


def compare_loaded(checkpoint: Checkpoint, origins: Origins | None = None) -> Loaded:
    """Compares every parameter and persistent buffer that `from_pretrained` gives a model from `checkpoint`'s folder
    with the tensors there as they are read here, or with their `origins`, where those are given and nothing differs.

    What headers and config show to be amiss is found without loading. Raises InputError if the files cannot be read.
    """
    model = meta_model(checkpoint.folder)
    try:
        layout = Layout(model, checkpoint.shapes)
        layout.check(checkpoint)
    except InputError as error:
        return Loaded(0, frozenset(), (str(error).removeprefix(f"{checkpoint.folder}: "),))
    map_blocks_from(2 * COMPARE_BYTES)
    with bar() as progress:
        task = progress.add_task("as transformers loads it (MB)", total=checkpoint.data_bytes >> 20)
        comparison = _Comparison(
            checkpoint, layout, origins or {}, lambda done: progress.update(task, completed=done >> 20)
        )
        try:
            with _each_given(type(model), comparison.take), _environment(NO_LOADING_AHEAD, "1"):
                loaded, info = auto_class(checkpoint.config).from_pretrained(
                    checkpoint.folder, local_files_only=True, trust_remote_code=trusted(), output_loading_info=True
                )
        except InputError:
            raise
        except Exception as error:  # foreign files can break a constructor in any way
            return Loaded(0, frozenset(), (f"transformers cannot load it ({first_line(error)})",))
    failures = [*_left_over(model, layout, comparison, loaded, info), *comparison.differing]
    return Loaded(len(comparison.seen), comparison.copies, tuple(failures))


def _left_over(
    model: nn.Module, layout: Layout, comparison: _Comparison, loaded: nn.Module, info: Mapping[str, Any]
) -> Iterator[str]:
    """Returns what is amiss with the model as a whole: another class, keys that did not match, values that never came,
    parts that were added. What it has kept is compared.
    """
    if type(loaded) is not type(model):
        yield f"transformers loads a {type(loaded).__name__}, not a {type(model).__name__}"
        return
    for kind, keys in info.items():
        if keys:
            yield f"transformers reports {kind}: {', '.join(sorted(map(str, keys))[:3])}"
    for name in layout.stored:
        if name in layout.expected and name not in comparison.seen:
            yield f"transformers never loads {name}"
    state = loaded.state_dict(keep_vars=True)
    for name in sorted(state.keys() ^ layout.expected):
        yield f"transformers loads a model of other parts: {name}"
        return
    for name, of in layout.tied.items():
        if state[name] is not state[of]:
            yield f"transformers does not tie {name} to {of}"
    for name, value in state.items():
        if not value.is_meta:
            comparison.take(name, value)


@dataclass
class _Comparison:
    """Of the values that a model is given, those that are in `layout`. seen: their names."""

    checkpoint: Checkpoint
    layout: Layout
    origins: Origins
    advance: Callable[[int], None]
    seen: set[str] = field(default_factory=set)
    _differing: dict[str, str] = field(default_factory=dict)
    _uncopied: set[str] = field(default_factory=set)
    _done: int = 0

    @property
    def copies(self) -> frozenset[str]:
        disks = {disk for name in self.seen for disk in self.layout.stored[name].disk}
        return frozenset(disks - self._uncopied)

    @property
    def differing(self) -> list[str]:
        """A line for each value that is not what was read here, or no number."""
        return [f"transformers {how}" for how in self._differing.values()]

    def take(self, name: str, value: Tensor) -> Tensor | None:
        """Compares `value`; what takes its place, without numbers. None for what does not come from the disk, and where
        the value may stay.
        """
        name = self.layout.tied.get(name, name)
        stored = self.layout.stored.get(name)
        if stored is None:
            return None
        self.seen.add(name)
        exact = all(DTYPES[self.checkpoint.info(disk).dtype] == value.dtype for disk in stored.disk)
        whole = stored.alone and all(isinstance(operation, REARRANGING) for operation in stored.operations)
        copied = all(disk in self.origins for disk in stored.disk) and self._equal(name, value, self.origins)
        if not (copied and exact and whole):
            self._uncopied.update(stored.disk)
        if not copied and not self._equal(name, value, {}):
            self._differing[name] = f"does not load {name} as it lies in {', '.join(stored.disk[:2])}"
        elif isinstance(value, nn.Parameter) and not _finite(value):
            self._differing[name] = f"loads NaN or Inf from {', '.join(stored.disk[:2])} as {value.dtype}"
        if self.checkpoint.data_bytes <= KEEP_BELOW_BYTES:
            return None
        empty = torch.empty_like(value, device="meta")
        empty = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
        empty._is_hf_initialized = True  # type: ignore[attr-defined]
        return empty

    def _equal(self, name: str, value: Tensor, origins: Origins) -> bool:
        """Tells whether `value` is what the tensors of parameter `name` make, read from their origins."""

        def read(disk: str, first: int = 0, last: int | None = None) -> Tensor:
            source, tensor = origins.get(disk, (self.checkpoint, disk))
            return source.read(tensor, first, last).to(value.dtype)

        disk = self.layout.plain(name)
        if disk is None:
            return self._same(self.layout.assemble(name, read), value)
        if value.shape != self.checkpoint.info(disk).shape:
            return False
        if not value.ndim:
            return self._same(read(disk), value)
        step = max(1, COMPARE_BYTES // max(1, self.checkpoint.info(disk).row_bytes))
        blocks = ((first, min(first + step, len(value))) for first in range(0, len(value), step))
        return all(self._same(read(disk, *block), value[slice(*block)]) for block in blocks)

    def _same(self, ours: Tensor, theirs: Tensor) -> bool:
        same, before = same_bits(ours, theirs), self._done // LET_GO_BYTES
        self._done += theirs.nbytes
        if self._done // LET_GO_BYTES > before:
            self.advance(self._done)
            drop_mapped([shard.path for shard in self.checkpoint.shards])
        return same


def _finite(value: Tensor) -> bool:
    """Tells whether no element is NaN or Inf, block by block: a minimum or a maximum of it would be one."""
    parts = value.detach().flatten().split(COMPARE_BYTES // value.element_size())
    return all(bool(torch.isfinite(end)) for part in parts if len(part) for end in torch.aminmax(part))


@contextmanager
def _each_given(kind: type, take: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """While the block runs, `take` gets the name and the value of every parameter and buffer with numbers that a model
    of class `kind` is given, and says what takes its place (None: nothing does).
    """
    model: nn.Module | None = None
    names: dict[nn.Module, str] = {}

    def settle(parent: nn.Module, _name: str, _child: nn.Module | None) -> None:
        nonlocal model
        model = parent if type(parent) is kind else model

    def given(module: nn.Module, name: str, value: Tensor | None) -> Any:
        if value is None or value.is_meta or model is None:
            return None
        if module not in names:
            names.update({child: path for path, child in model.named_modules()})
        return take(f"{names[module]}.{name}".lstrip("."), value) if module in names else None

    handles = [
        register_module_module_registration_hook(settle),
        register_module_parameter_registration_hook(given),
        register_module_buffer_registration_hook(given),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """The environment variable `name` is `value` while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
