"""A guard's projections as PEFT LoRA adapters: W - strength V^T (V W) is W + B A with A = V W, B = -strength V^T.

The base model stays as it is; the adapter is removed by not loading it. What PEFT 0.21 makes of each kind of writer:

1. a linear layer: lora_A = V W, lora_B = -strength V^T (of a linear gate: its readout and its column);
2. its bias: lora_B.bias = -strength V^T (V b), in an adapter of its own (BIASED), for one that has biases must have
   them everywhere (PEFT cannot merge a bias into a layer without one);
3. the embedding table [words, d]: lora_embedding_A = (-strength W V^T)^T, lora_embedding_B = V^T;
4. experts stacked in one parameter: the same for each of them, through target_parameters;
5. anything else (a gate's neurons, single vectors, position tables): not at all.

Scaling is 1 throughout (alpha = rank), so that runtimes which ignore alpha_pattern load the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import save
from torch import Tensor, nn

from ....guard.guard import Guard
from ....guard.interventions import Intervention
from ....guard.weight_edits import ReplaceNeurons, WeightEdit
from ...checkpoint.edits import (
    AddProduct,
    Folded,
    ProjectColumns,
    Projecting,
    ProjectRows,
    ProjectSlices,
    row_blocks,
    taken,
)
from ...checkpoint.headers import Checkpoint
from ...checkpoint.layout import Layout, Shape
from ...checkpoint.merge import PREFIX, WEIGHTS_FILE
from ...families.table import Family, Writer
from ...fold import Fold

BIASED = "biased"
"""Folder, and PEFT's name, of the second adapter: of the layers whose biases change too."""

LACKS: dict[type[WeightEdit], str] = {ReplaceNeurons: "adds neurons, which no update of weights does"}
"""What may be asked of weights and no adapter holds, and why."""


@dataclass
class Adapter:
    """One PEFT adapter: its tensors by their names in the file, and what its config says of them.

    modules, parameters: target -> rank.
    """

    bias: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def config(self, base: str, revision: str | None) -> LoraConfig:
        ranks = {**self.modules, **self.parameters}
        (rank, _), *_ = Counter(sorted(ranks.values(), reverse=True)).most_common()
        other = {name: other_rank for name, other_rank in ranks.items() if other_rank != rank}
        return LoraConfig(
            base_model_name_or_path=base,
            revision=revision,
            r=rank,
            lora_alpha=rank,
            rank_pattern=dict(other),
            alpha_pattern=dict(other),
            target_modules=list(self.modules),
            target_parameters=list(self.parameters) or None,
            lora_bias=self.bias,
            inference_mode=True,
        )

    def rename_for(self, model: nn.Module) -> None:
        """Names linear layers as parameters where PEFT would take their names for those of former experts: it renames
        targets called down_proj in families whose experts were modules before transformers 5 stacked them.
        """
        config = self.config("", None)
        convert_peft_config_for_transformers(config, model, None)
        for name in set(self.modules) - set(config.target_modules or ()):
            self.parameters[f"{name}.weight"] = self.modules.pop(name)

    def save(self, folder: Path, base: str, revision: str | None) -> None:
        """Writes the adapter into `folder`. OSError as the disk does."""
        folder.mkdir(exist_ok=True)
        (folder / WEIGHTS_FILE).write_bytes(save(self.tensors, {"format": "pt"}))
        self.config(base, revision).save_pretrained(str(folder))


def lacks(intervention: type[Intervention] | Intervention) -> str | None:
    """Why no adapter holds an intervention (or any of a class), one line; None if one does."""
    if not intervention.asks:
        return f"weights cannot hold it; {intervention.instead}"
    return next((LACKS[ask] for ask in intervention.asks if ask in LACKS), None)


def adaptable(guard: Guard) -> tuple[Guard | None, list[str]]:
    """Returns (what of `guard` adapters can hold, what they cannot and why, a line each)."""
    kept = tuple(intervention for intervention in guard.interventions if lacks(intervention) is None)
    lost = [
        (intervention.describe(), reason) for intervention in guard.interventions if (reason := lacks(intervention))
    ]
    more = {"left_out": [described for described, _ in lost]} if lost else {}
    return (
        replace(guard, interventions=kept, provenance={**guard.provenance, **more}) if kept else None,
        [f"{_called(described)}: {reason}" for described, reason in lost],
    )


def _called(described: Mapping[str, Any]) -> str:
    return f"{described['kind']} (layer {described['layer']})" if "layer" in described else described["kind"]


Written = Callable[[nn.Module, AddProduct], dict[str, Tensor]]


@dataclass(frozen=True)
class _Target:
    """A parameter that an adapter updates: its name in memory, its module, whose tensor it is, and how PEFT is told."""

    memory: str
    module: nn.Module
    writer: Writer
    form: Written


def _targets(
    checkpoint: Checkpoint, layout: Layout, family: Family, fold: Fold
) -> tuple[list[_Target], dict[str, str]]:
    """Returns (the parameters that `fold` edits and adapters update; tensor on disk -> why no adapter holds its
    edits).
    """
    model, targets = checkpoint.model, list[_Target]()
    writers = {writer.disk: writer for writer in family.writers if writer.disk in fold.edits}
    left_out = {name: "the unmodified model has no such tensor" for name in fold.edits if name not in writers}
    for memory, stored in layout.stored.items():
        if stored.disk[0] not in writers:
            continue
        name, _, leaf = memory.rpartition(".")
        module = model.get_submodule(name)
        form = _form(module, leaf, model.get_input_embeddings())
        if form:
            targets.append(_Target(memory, module, writers[stored.disk[0]], form))
        else:
            left_out[stored.disk[0]] = f"{type(module).__name__} {leaf}: PEFT adapts no such parameter"
    return targets, left_out


def unadaptable(checkpoint: Checkpoint, family: Family, fold: Fold) -> dict[str, str]:
    """Returns tensor on disk -> why no adapter holds what `fold` makes of it, for those of which none does. No weights
    are read.
    """
    return _targets(checkpoint, Layout(checkpoint.model, checkpoint.shapes), family, fold)[1]


def adapters(checkpoint: Checkpoint, family: Family, fold: Fold) -> tuple[list[Adapter], dict[str, str]]:
    """Returns (`fold`'s projections as adapters, the plain one first; tensor on disk -> why no adapter holds its
    edits).

    Reads the edited tensors in blocks of rows; of what transformers stacks, one parameter at a time.
    """
    model, layout = checkpoint.model, Layout(checkpoint.model, checkpoint.shapes)
    by_bias = {False: Adapter(False), True: Adapter(True)}
    targets, left_out = _targets(checkpoint, layout, family, fold)
    written = {target.memory for target in targets}
    for target in targets:
        memory, module, writer, form = target.memory, target.module, target.writer, target.form
        name, _, leaf = memory.rpartition(".")
        edits = [edit for edit in fold.edits[writer.disk] if isinstance(edit, Projecting | AddProduct)]
        shape = tuple(model.get_parameter(memory).shape)
        update = low_rank(_reading(checkpoint, layout, memory), shape, _in_memory(edits, writer, memory, layout, shape))
        to = by_bias[isinstance(module, nn.Linear) and f"{name}.bias" in written]
        for suffix, tensor in form(module, update).items():
            to.tensors[f"{PREFIX}{name}.{suffix}"] = tensor.float().contiguous()
        if leaf != "bias":
            goals, goal = (to.parameters, memory) if form is _stacked else (to.modules, name)
            goals[goal] = update.right.shape[-2]
        elif f"{name}.weight" not in written:  # PEFT gives a bias to nothing but an update of the weight
            out, into = model.get_parameter(f"{name}.weight").shape
            none = AddProduct(torch.zeros(out, 1), torch.zeros(1, into))
            to.tensors |= {f"{PREFIX}{name}.{suffix}": tensor for suffix, tensor in _linear(module, none).items()}
            to.modules[name] = 1
    made = [adapter for adapter in by_bias.values() if adapter.tensors]
    for adapter in made:
        adapter.rename_for(model)
    return made, left_out


def _form(module: nn.Module, leaf: str, embedding: nn.Module) -> Written | None:
    """Returns how PEFT writes an update of parameter `leaf` of `module`; None if it has no way to."""
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward
        return (_linear_bias if leaf == "bias" else _linear) if plain else None
    if isinstance(module, nn.Embedding):
        known = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return _embedding if known and module is embedding else None
    parameter = getattr(module, leaf)
    return _stacked if parameter.ndim in (2, 3) else None


def _linear(_module: nn.Module, update: AddProduct) -> dict[str, Tensor]:
    return {"lora_A.weight": update.right, "lora_B.weight": update.left}


def _linear_bias(_module: nn.Module, update: AddProduct) -> dict[str, Tensor]:
    return {"lora_B.bias": update.left @ update.right}


def _embedding(_module: nn.Module, update: AddProduct) -> dict[str, Tensor]:
    return {"lora_embedding_A": update.left.T, "lora_embedding_B": update.right.T}


def _stacked(module: nn.Module, update: AddProduct) -> dict[str, Tensor]:
    """lora_A [E r, in], expert by expert; lora_B [out, r E], expert after expert for each direction.

    PEFT takes a stack as [E, out, in], or [E, in, out] where the module calls itself transposed.
    """
    if update.right.ndim == 2:
        return _linear(module, update)
    turned = update.turned() if getattr(module, "is_transposed", False) else update
    return {"lora_A.weight": turned.right.flatten(0, 1), "lora_B.weight": turned.left.permute(1, 2, 0).flatten(1)}


LowRankEdit = Projecting | AddProduct
"""The edits that are updates of low rank."""

ReadBlock = Callable[[int, int], Tensor]


def _reading(checkpoint: Checkpoint, layout: Layout, memory: str) -> ReadBlock:
    """Returns how to read rows of the parameter `memory`: from its file, or, where it is made of several tensors, from
    itself, held while it is needed.
    """
    disk = layout.plain(memory)
    if disk is not None:
        return partial(checkpoint.read, disk)
    whole = layout.assemble(memory, checkpoint.read)
    return lambda first, last: whole[first:last]


def _in_memory(
    edits: Sequence[LowRankEdit], writer: Writer, memory: str, layout: Layout, shape: Shape
) -> Sequence[LowRankEdit]:
    """Returns `edits` of a tensor on disk as edits of the parameter that is made of it."""
    stored = layout.stored[memory]
    if not stored.operations:
        return edits
    axis = next(axis for axis in range(len(shape)) if stored.axis(axis, shape, layout.disk_shapes) == writer.axis)
    kind = ProjectColumns if axis == len(shape) - 1 else ProjectSlices
    return [kind(edit.basis, edit.strength, edit.gain) for edit in edits if isinstance(edit, Projecting)]


def low_rank(read: ReadBlock, shape: Shape, edits: Sequence[LowRankEdit]) -> AddProduct:
    """Returns what `edits`, one after the other, add to a tensor, as L R of rank r, the sum of the edits' ranks.

    read: (first, last) -> those rows of it.  shape: [d, n], [n, d], [E, d, n], [E, n, d] or [d].  Float32 or better.
    """
    parts = [_update(Folded(read, shape, edits[:index]), edit) for index, edit in enumerate(edits)]
    rows = 0 if len(shape) == 1 else -2
    lefts, rights = ([part.double() for part in side] for side in zip(*parts, strict=True))
    return AddProduct(torch.cat(lefts, -1), torch.cat(rights, rows))


def _update(before: Folded, edit: LowRankEdit) -> tuple[Tensor, Tensor]:
    """Returns (L, R) of what `edit` adds: -strength V^T and V W, or -strength W V^T and V where columns are
    projected.
    """
    if isinstance(edit, AddProduct):
        return edit.left, edit.right
    components = [taken(edit, before.rows(first, last), first) for first, last in row_blocks(before.shape)]
    if isinstance(edit, ProjectRows):
        right = torch.stack(components).sum(0)
        return -edit.strength * edit.writing.T.to(right), right
    component = torch.cat(components)
    writing = edit.writing.to(component).expand(*component.shape[:-2], *edit.writing.shape)
    if isinstance(edit, ProjectColumns):
        return -edit.strength * component, writing
    return -edit.strength * writing.mT, component


def without(fold: Fold, left_out: Mapping[str, str]) -> Fold:
    """Returns what adapters hold of `fold`: not the tensors `left_out`, and no head of its own, for PEFT leaves a tied
    one as it was when it updates the embedding.
    """
    if not left_out:
        return replace(fold, untie=False)
    reasons = tuple(f"{name} ({reason})" for name, reason in left_out.items())
    kept = {tensor: edits for tensor, edits in fold.edits.items() if tensor not in left_out}
    more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    plain = replace(fold, grown={}, new={}, text_config={})
    return replace(plain, edits=kept, untie=False, approximate=f"left out: {reasons[0]}{more}", left_out=reasons)
