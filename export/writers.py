"""Residual writers: which tensors of a checkpoint write to the residual stream, read from families/*.toml.

Rows for the layers are keyed by the text model's type, rows for the vision path by the outer model's type, so that a
LLaVA around any known decoder resolves, and one around an unknown decoder is refused by name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from transformers import PreTrainedModel

from ..guard.errors import InputError
from ..guard.vlm import meta_model
from .checkpoint import EDITABLE, QUANTISED, Checkpoint
from .names import disk_name, memory_to_disk

Role = Literal["embedding", "vision", "attention", "mlp"]


@dataclass(frozen=True)
class Writer:
    """One tensor that writes to the residual stream: its names, and the axis that is the residual stream's (size d)."""

    role: Role
    layer: int | None
    memory: str
    disk: str
    axis: int


@dataclass(frozen=True)
class MLP:
    """The weights of one layer's dense MLP on disk: down(act(gate x) * up x), or down(act(gate x)) where up is None."""

    gate: str
    up: str | None
    down: str

    @property
    def reading(self) -> tuple[str, ...]:
        """The weights that read the MLP's input, one row a neuron."""
        return (self.gate,) if self.up is None else (self.gate, self.up)

    @staticmethod
    def bias_of(weight: str) -> str:
        """What the bias that belongs to `weight` is called, whether the checkpoint has it or not."""
        return weight.removesuffix(".weight") + ".bias"


@dataclass(frozen=True)
class Family:
    """What is known of a model before any weight is read: its writers on disk, its head, and whether it is pre-norm."""

    model_type: str
    text_model_type: str
    layers: int
    width: int
    pre_norm: bool
    writers: tuple[Writer, ...]
    mlps: Mapping[int, MLP]
    """Layer -> its MLP, for the layers that have a dense one."""
    bias_flag: str | None
    """The text config's entry that gives every MLP biases, where the family has one."""
    neurons_key: str
    """The text config's entry that counts an MLP's neurons."""
    embedding: str
    head: str | None
    """The head's tensor on disk; None where the checkpoint has none and the embedding serves as head (tied)."""
    untied_head: str
    """What the head's tensor is called on disk once it has one of its own."""

    @property
    def tied(self) -> bool:
        return self.head is None


@cache
def _families() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    text, outer = {}, {}
    for path in sorted((files("guardfold.export") / "families").iterdir(), key=lambda path: path.name):
        row = tomllib.loads(path.read_text(encoding="utf-8"))
        text.update(dict.fromkeys(row.get("text_model_types", []), row))
        outer.update(dict.fromkeys(row.get("model_types", []), row))
    return text, outer


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of `checkpoint` with every writer found on disk. No weights are read.

    Raises InputError naming the model type if it has no row, or the tensor if a row matches none or does not fit.
    """
    text_rows, outer_rows = _families()
    model = meta_model(checkpoint.folder)
    text_config = model.config.get_text_config()
    outer_type, text_type = model.config.model_type, text_config.model_type
    for kind, model_type, known in (("family", outer_type, outer_rows), ("text model", text_type, text_rows)):
        if model_type not in known:
            raise InputError(
                f"{checkpoint.folder}: {kind} {model_type!r} is not supported; known: {', '.join(sorted(known))}"
            )
    outer, text = outer_rows[outer_type], text_rows[text_type]
    disk = memory_to_disk(model, checkpoint.tensors)
    shapes = {name: tuple(each.shape) for name, each in model.state_dict(keep_vars=True).items()}
    found = [
        *_rows(outer["writer"], "", 0, disk, checkpoint),
        *_rows(text["writer"], outer["text_model"] + ".", text_config.num_hidden_layers, disk, checkpoint),
    ]
    width = text_config.hidden_size
    for writer in found:
        _check(checkpoint, writer, shapes, width)
    embedding = next(writer for writer in found if writer.role == "embedding")
    head = outer["head"] + ".weight"
    return Family(
        model_type=outer_type,
        text_model_type=text_type,
        layers=text_config.num_hidden_layers,
        width=width,
        pre_norm=text["norm"] == "pre",
        writers=tuple(found),
        mlps=_mlps(text["mlp"], outer["text_model"] + ".", text_config.num_hidden_layers, disk),
        bias_flag=text["mlp"].get("bias_flag", {}).get(text_type),
        neurons_key=text["mlp"].get("width", "intermediate_size"),
        embedding=embedding.disk,
        head=disk.get(head),
        untied_head=_untied_name(model, embedding.disk, head, checkpoint),
    )


def _rows(
    rows: list[dict[str, Any]], prefix: str, layers: int, disk: Mapping[str, str], checkpoint: Checkpoint
) -> Iterator[Writer]:
    for row in rows:
        numbers: list[int | None] = list(range(layers)) if "{layer}" in row.get("module", "") else [None]
        for layer in numbers:
            if "parameter" in row:
                names, needed = [prefix + row["parameter"]], 1
            else:
                module = prefix + row["module"].format(layer=layer)
                names, needed = [f"{module}.weight", f"{module}.bias"], 1
            for position, name in enumerate(names):
                if name in disk:
                    axis = row["axis"] if position == 0 else 0
                    yield Writer(row["role"], layer, name, disk[name], axis)
                elif position < needed:
                    raise InputError(f"{checkpoint.folder}: no tensor for {name}, which writes to the residual stream")


def _mlps(row: Mapping[str, Any], prefix: str, layers: int, disk: Mapping[str, str]) -> dict[int, MLP]:
    mlps = {}
    for layer in range(layers):
        names = {
            part: prefix + row[part].format(layer=layer) + ".weight" for part in ("gate", "up", "down") if part in row
        }
        if all(name in disk for name in names.values()):
            found = {part: disk[name] for part, name in names.items()}
            mlps[layer] = MLP(found["gate"], found.get("up"), found["down"])
    return mlps


def _check(checkpoint: Checkpoint, writer: Writer, shapes: Mapping[str, tuple[int, ...]], width: int) -> None:
    info = checkpoint.info(writer.disk)
    where = f"{checkpoint.folder}: tensor {writer.disk!r}"
    if info.dtype not in EDITABLE:
        raise InputError(f"{where} is {info.dtype}; {QUANTISED}")
    if info.shape != shapes[writer.memory]:
        raise InputError(f"{where} has shape {list(info.shape)}, config.json says {list(shapes[writer.memory])}")
    if info.shape[writer.axis] != width:
        raise InputError(f"{where}: axis {writer.axis} of {list(info.shape)} is not the hidden size, {width}")


def _untied_name(model: PreTrainedModel, embedding: str, head: str, checkpoint: Checkpoint) -> str:
    """What a head is called in this checkpoint's own style: beside its embedding's prefix, whichever one loads."""
    prefix = embedding.partition(".")[0]
    name = disk_name(model, head, (head,) if prefix == model.base_model_prefix else (f"{prefix}.{head}", head))
    if name is None:
        raise InputError(f"{checkpoint.folder}: no name under which transformers would load an untied {head}")
    return name
