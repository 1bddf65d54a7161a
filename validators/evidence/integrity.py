"""Is the folder sound? Untouched tensors bit-identical, shapes and dtypes kept, and every value in it, as read here,
what plain transformers loads (loaded.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model_state_dict

from ...export.checkpoint.edits import Folded, row_blocks
from ...export.checkpoint.headers import Checkpoint, TensorInfo, read_shard
from ...export.checkpoint.merge import NAME, PREFIX, WEIGHTS_FILE
from ...export.families.table import Family
from ...export.fold import Fold
from ...export.formats.lora import BIASED, Adapted, folders
from ...guard.base.progress import track
from ..runtimes.adapted import LOAD_BELOW_BYTES, attach, base_model
from .loaded import compare_loaded
from .piece import JSON, Context, Piece

INSPECTED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Integrity:
    """identical: tensors whose bytes are the source's; edited, added: the others.  loaded: how they were held to what
    transformers loads.
    """

    identical: int
    edited: int
    added: tuple[str, ...]
    loaded: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def inspect_folder(source: Checkpoint, folded: Checkpoint, family: Family, fold: Fold) -> Integrity:
    """Returns `folded` against `source`, of which `fold` edits some tensors. Raises InputError if a file cannot be
    read.
    """
    expected = {name: (info.dtype, fold.grown.get(name, info.shape)) for name, (_, info) in source.tensors.items()}
    copies = {name: name for name in source.tensors if name not in fold.changed}
    added = dict.fromkeys([family.untied_head] if fold.untie else [], family.embedding)
    expected |= {name: expected[origin] for name, origin in added.items()}
    expected |= {name: (source.info(like).dtype, fold.grown[name]) for name, like in fold.new.items()}
    failures = list(_table_failures(expected, folded))
    origins = copies | added
    loaded = compare_loaded(folded, {name: (source, origin) for name, origin in origins.items()})
    rest = [(name, origin) for name, origin in origins.items() if name in folded.tensors and name not in loaded.copies]
    for name, origin in track(rest, "integrity"):
        if not _same_bytes(source, origin, folded, name):
            failures.append(f"{name} should be untouched but differs")
    for name in sorted(set(fold.grown) - set(fold.edits) - set(fold.new)):
        if not failures and not _only_padded(source, folded, name):
            failures.append(f"{name} should only have grown by zeros but differs")
    edited = len(fold.changed - set(fold.new))
    how = f"from_pretrained, {loaded.count} values bit for bit"
    return Integrity(len(copies), edited, (*added, *fold.new), how, (*failures, *loaded.failures))


def _table_failures(expected: Mapping[str, tuple[str, tuple[int, ...]]], folded: Checkpoint) -> Iterator[str]:
    for name in sorted(set(expected) - set(folded.tensors)):
        yield f"{name} is missing"
    for name in sorted(set(folded.tensors) - set(expected)):
        yield f"{name} does not belong"
    for name in sorted(set(expected) & set(folded.tensors)):
        dtype, shape = expected[name]
        found = folded.info(name)
        if (dtype, shape) != (found.dtype, found.shape):
            yield f"{name} is {found.dtype} {list(found.shape)}, should be {dtype} {list(shape)}"


def _only_padded(source: Checkpoint, folded: Checkpoint, name: str) -> bool:
    before, after = source.info(name), folded.info(name)
    padded = Folded(partial(source.read, name), before.shape, (), after.shape)
    return all(torch.equal(padded.rows(*block), folded.read(name, *block).float()) for block in row_blocks(after.shape))


def _same_bytes(source: Checkpoint, name: str, folded: Checkpoint, other: str) -> bool:
    before, after = source.info(name), folded.info(other)
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return True  # said already, by name

    def blocks(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[bytearray]:
        rows = info.shape[0] if info.shape else 1
        step = max(1, INSPECTED_BYTES // max(1, info.row_bytes))
        for first in range(0, rows, step):
            yield checkpoint.read_bytes(info.name, first, min(first + step, rows))

    return all(a == b for a, b in zip(blocks(source, before), blocks(folded, after), strict=True))


def inspect_adapters(adapted: Adapted) -> Integrity:
    """Does PEFT put every tensor of the files where it belongs, and leave the base's weights bit for bit as they were?

    Of bases too large to load, the names and shapes are compared.
    """
    source = adapted.source
    if source.data_bytes > LOAD_BELOW_BYTES:
        count = len(adapted.edits)
        return Integrity(len(source.tensors), count, (), "names and shapes", ())
    loaded = attach(base_model(source), adapted.place)
    failures = []
    for name, folder in zip((NAME, BIASED), folders(adapted.place), strict=False):
        held = Checkpoint(folder, {}, (read_shard(folder, WEIGHTS_FILE),), None)
        found = get_peft_model_state_dict(loaded, adapter_name=name, save_embedding_layers=False)
        astray = set(held.tensors) ^ set(found)
        failures += [f"{tensor}: PEFT loads it nowhere" for tensor in sorted(astray)]
        failures += [
            f"{tensor} is not what PEFT loads"
            for tensor in sorted(set(held.tensors) & set(found))
            if not torch.equal(held.read(tensor), found[tensor].float())
        ]
    after = {
        name.removeprefix(PREFIX).replace(".base_layer", ""): parameter
        for name, parameter in loaded.named_parameters(remove_duplicate=False)
        if "lora_" not in name
    }
    failures += [
        f"{name}: the base's weights change when the adapter is loaded"
        for name, parameter in base_model(source).named_parameters()
        if not torch.equal(parameter, after[name])
    ]
    return Integrity(len(source.tensors), 0, (), "PeftModel.from_pretrained", tuple(failures))


def _run(context: Context) -> Integrity:
    edited = context.edited
    if edited is None:
        return Integrity(len(context.source.tensors), 0, (), "the original's own", ())
    if isinstance(edited.weights, Adapted):
        return inspect_adapters(edited.weights)
    return inspect_folder(context.source, edited.weights, edited.family, edited.fold)


def _summary(found: Integrity) -> str:
    added = f", {len(found.added)} added" if found.added else ""
    return f"{found.identical} tensors identical, {found.edited} edited{added}"


def _sentence(figures: JSON) -> Iterator[str]:
    whole = figures["integrity"]
    yield f"{whole['identical']} tensors equal the original's byte for byte; {whole['edited']} were edited."


INTEGRITY = Piece(
    "integrity",
    _run,
    label="integrity",
    failures=lambda found: found.failures,
    summary=_summary,
    page_head=_sentence,
)
