"""A PEFT LoRA adapter, untrusted, as edits of the checkpoint that it was trained on: what merging it changes.

Which module an entry of the file belongs to, its rank and its scaling, PEFT itself says: it is given the model without
weights and the adapter's config, and the modules that it would make are read off. Merged is

1. a linear layer: W + s B A (transposed where it is kept so), with DoRA each row then scaled to its magnitude;
2. its bias, where the adapter has biases: b + s B.bias;
3. the embedding table: W + s (B A)^T, with DoRA each column then scaled;
4. experts stacked in one parameter: the same for each of them, wherever they lie on disk;
5. what the adapter keeps whole (modules_to_save): in place of the base's.

What cannot be merged, or not without changing more than the adapter does, is refused by name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, Transpose

from ...guard.base.errors import InputError, first_line
from ...guard.base.untrusted import open_regular, parse_object, read_bytes
from ...guard.model.vlm import MAX_CONFIG_BYTES
from ..families.table import Family
from ..fold import Fold
from ..source import Source
from .edits import AddProduct, Edit, SetAll, SetNorms
from .headers import EDITABLE, Checkpoint, read_shard
from .layout import Layout, Stored

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names in memory."""

NAME = "default"
"""PEFT's name of the one adapter."""

NOT_MERGED = (
    *("trainable_token_indices", "layer_replication", "megatron_config", "use_qalora", "alora_invocation_tokens"),
    *("ensure_weight_tying", "velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
)
"""Settings whose adapters are more than low-rank updates of single weights."""

UPDATES_ONLY = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are."""

DESCRIPTIVE = ("base_model_class", "parent_library", "unsloth_fixed", "qat_config")
"""Settings beside LoraConfig's that some tools write and nothing depends on."""


def describe_adapter(name: str, folder: Path) -> dict[str, Any]:
    """Returns what a manifest says of the adapter `name` in `folder`: its hub commit, if any, and the SHA-256 of its
    file.
    """
    with os.fdopen(open_regular(folder, WEIGHTS_FILE), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": name, "revision": Source(name, folder).revision, "sha256": digest}


def merging(checkpoint: Checkpoint, family: Family, folder: Path) -> Fold:
    """Returns the edits that merge the adapter in `folder` into `checkpoint`. Reads all of the adapter, nothing of the
    weights.

    Raises InputError, naming the file and the entry or setting, for what is unsound or cannot be merged.
    """
    edits = updates(checkpoint, folder)
    if family.tied and family.embedding in edits:
        raise InputError(
            f"{folder}: changes the embedding, which the head of {family.model_type} is tied to, so that merging would "
            "change the head as well; untie the base model and train the adapter anew"
        )
    return Fold(edits)


def updates(checkpoint: Checkpoint, folder: Path) -> dict[str, list[Edit]]:
    """Returns tensor on disk -> what the adapter in `folder` makes of it, a tied head being left as it is. Raises as
    above.
    """
    config, tensors = _read_config(folder), _read_tensors(folder)
    layout, model = Layout(checkpoint.model, checkpoint.shapes), checkpoint.own_model()
    try:
        inject_adapter_in_model(config, model, NAME, low_cpu_mem_usage=True)
        tensors = convert_peft_adapter_state_dict_for_transformers(model, config, tensors, NAME)
    except Exception as error:  # foreign settings can break PEFT in any way
        raise InputError(
            f"{folder / CONFIG_FILE}: PEFT cannot put it on {checkpoint.folder} ({first_line(error)})"
        ) from error
    entries = _Entries(folder, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})
    edits: dict[str, list[Edit]] = {}
    for memory, edit in _edits(model, entries, layout):
        for disk, on_disk in _on_disk(layout, memory, edit, checkpoint, folder):
            edits.setdefault(disk, []).append(on_disk)
    entries.check_all_taken()
    return edits


def _read_config(folder: Path) -> LoraConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{folder}: no {CONFIG_FILE}; --adapter takes a PEFT adapter's folder or hub id")
    settings = parse_object(read_bytes(folder, CONFIG_FILE, MAX_CONFIG_BYTES), str(path))
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type {settings.get('peft_type')!r}; only LORA adapters are merged")
    for name in NOT_MERGED:
        if settings.get(name):
            raise InputError(f"{path}: {name} is set; such adapters are not merged")
    if settings.get("bias", "none") != "none":
        raise InputError(f"{path}: bias {settings['bias']!r}; PEFT does not load such biases, so they are not merged")
    if settings.get("init_lora_weights") not in UPDATES_ONLY:
        raise InputError(
            f"{path}: init_lora_weights {settings['init_lora_weights']!r} changes the base's weights as well; save the "
            "adapter with path_initial_model_for_weight_conversion first"
        )
    known = {field.name for field in fields(LoraConfig)}
    unknown = sorted(name for name in set(settings) - known - set(DESCRIPTIVE) if settings[name])
    if unknown:
        raise InputError(f"{path}: unknown setting {unknown[0]!r}; a newer PEFT may know it")
    try:
        return LoraConfig(**{name: settings[name] for name in known & set(settings) - {"peft_type"}})
    except Exception as error:  # foreign settings can break it in any way
        raise InputError(f"{path}: not a sound LoRA config ({error})") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder}: no {WEIGHTS_FILE}; pickled adapters (.bin) are not opened, save it as safetensors")
    shard = read_shard(folder, WEIGHTS_FILE)
    held = Checkpoint(folder, {}, (shard,), None)
    for name, info in shard.tensors.items():
        if info.dtype not in EDITABLE:
            raise InputError(f"{folder / WEIGHTS_FILE}: tensor {name!r} is {info.dtype}; only floats are merged")
    return {name: held.read(name) for name in shard.tensors}


class _Entries:
    """The tensors of the file by PEFT's names, each taken once."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.path, self._left = folder / WEIGHTS_FILE, tensors

    def take(self, name: str, like: Tensor) -> Tensor:
        found = self.find(name, like)
        if found is None:
            raise InputError(f"{self.path}: no tensor {PREFIX + name!r}, which its config asks for")
        return found

    def find(self, name: str, like: Tensor) -> Tensor | None:
        """Returns the tensor `name`, if it is there and of the shape of `like`."""
        found = self._left.pop(name, None)
        if found is None:
            return None
        if found.shape != like.shape:
            raise InputError(
                f"{self.path}: tensor {PREFIX + name!r} has shape {list(found.shape)}, not {list(like.shape)}"
            )
        if not torch.isfinite(found).all():
            raise InputError(f"{self.path}: tensor {PREFIX + name!r} has NaN or Inf")
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def check_all_taken(self) -> None:
        if self._left:
            raise InputError(f"{self.path}: tensor {PREFIX + min(self._left)!r} belongs to nothing that is merged")


def _edits(model: nn.Module, entries: _Entries, layout: Layout) -> Iterator[tuple[str, Edit]]:
    """Returns (parameter's name in memory, edit), tensors kept whole first."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for leaf, like in module.modules_to_save[NAME].named_parameters():
                yield f"{name}.{leaf}", SetAll(entries.take(f"{name}.{leaf}", like))
    for memory, shape in layout.shapes.items():  # an embedding that PEFT saved beside its update
        prefix, _, leaf = memory.rpartition(".")
        for key in (memory, f"{prefix}.base_layer.{leaf}"):
            whole = entries.find(key, torch.empty(shape, device="meta"))
            if whole is not None:
                yield memory, SetAll(whole)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.scaling:
            if type(module) not in _UPDATES:
                raise InputError(f"{entries.path}: {name} is a {type(module).__name__} layer; such are not merged")
            yield from _UPDATES[type(module)](module, name, entries)


def _linear(module: Any, name: str, entries: _Entries) -> Iterator[tuple[str, Edit]]:
    a, b = module.lora_A[NAME], module.lora_B[NAME]
    update = AddProduct(
        module.scaling[NAME] * entries.take(f"{name}.lora_B.weight", b.weight),
        entries.take(f"{name}.lora_A.weight", a.weight),
    )
    yield f"{name}.weight", update.turned() if module.fan_in_fan_out else update
    if module.use_dora[NAME]:
        norms = entries.take(f"{name}.lora_magnitude_vector", b.weight[:, 0])
        yield f"{name}.weight", SetNorms(norms, 1 if module.fan_in_fan_out else 0)
    if b.bias is not None:
        bias = module.scaling[NAME] * entries.take(f"{name}.lora_B.bias", b.bias)
        yield f"{name}.bias", AddProduct(bias[:, None], torch.ones(1))


def _embedding(module: Any, name: str, entries: _Entries) -> Iterator[tuple[str, Edit]]:
    a, b = module.lora_embedding_A[NAME], module.lora_embedding_B[NAME]
    left = module.scaling[NAME] * entries.take(f"{name}.lora_embedding_A", a).T
    yield f"{name}.weight", AddProduct(left, entries.take(f"{name}.lora_embedding_B", b).T)
    if module.use_dora[NAME]:
        yield f"{name}.weight", SetNorms(entries.take(f"{name}.lora_magnitude_vector", b[:, 0]), 1)


def _parameter(module: Any, name: str, entries: _Entries) -> Iterator[tuple[str, Edit]]:
    """PEFT keeps experts' updates as lora_A [E r, in] and lora_B [out, r E], the expert the fastest in the latter."""
    a = entries.take(f"{name}.lora_A.weight", module.lora_A[NAME].weight)
    b = module.scaling[NAME] * entries.take(f"{name}.lora_B.weight", module.lora_B[NAME].weight)
    update = AddProduct(b, a)
    if module.get_param().ndim == 3:
        count = module.num_experts
        update = AddProduct(b.reshape(len(b), -1, count).permute(2, 0, 1), a.reshape(count, -1, a.shape[1]))
        if getattr(module.get_base_layer(), "is_transposed", False):
            update = update.turned()
    yield f"{name.replace('.base_layer', '')}.{module.parameter_name}", update


Updates = Callable[[Any, str, _Entries], Iterator[tuple[str, Edit]]]
_UPDATES: Mapping[type, Updates] = {Linear: _linear, Embedding: _embedding, ParamWrapper: _parameter}


def _on_disk(
    layout: Layout, memory: str, edit: Edit, checkpoint: Checkpoint, folder: Path
) -> Iterator[tuple[str, Edit]]:
    """Returns `edit` of the parameter `memory` as edits of the tensors on disk that it is made of."""
    stored = layout.stored.get(memory)
    if stored is None:
        raise InputError(f"{folder}: changes {memory}, of which {checkpoint.folder} has no tensor of its own")
    for disk in stored.disk:
        if checkpoint.info(disk).dtype not in EDITABLE:
            raise InputError(
                f"{checkpoint.folder}: tensor {disk!r} is {checkpoint.info(disk).dtype}; adapters are merged into "
                "floats: name the unquantised base model"
            )
    parts = _taken_apart(edit, stored, layout.shapes[memory], checkpoint.shapes)
    if parts is None or not stored.alone or len(parts) != len(stored.disk):
        raise InputError(f"{folder}: changes {memory}, which {checkpoint.folder} keeps in a form it is not merged into")
    yield from zip(stored.disk, parts, strict=True)


def _taken_apart(
    edit: Edit, stored: Stored, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]
) -> Sequence[Edit] | None:
    """Returns `edit` of a parameter of `shape` before transformers' operations were applied: one for each tensor on
    disk, of `shapes`. None if that is not known.
    """
    if not stored.operations:
        return [edit]
    if not isinstance(edit, AddProduct):
        return None
    parts, shape = [edit], tuple(shape)
    for operation in reversed(stored.operations):
        last = {len(shape) - 2, len(shape) - 1}
        if isinstance(operation, Transpose) and {operation.dim0 % len(shape), operation.dim1 % len(shape)} == last:
            if not (operation.check_dims and tuple(shapes[stored.disk[0]]) == shape):
                parts, shape = [part.turned() for part in parts], (*shape[:-2], shape[-1], shape[-2])
        elif isinstance(operation, MergeModulelist) and operation.dim == 0 and len(parts) == 1:
            parts = [AddProduct(*factors) for factors in zip(parts[0].left, parts[0].right, strict=True)]
            shape = shape[1:]
        else:
            return None
    return parts
