"""Names on disk and names in memory: transformers 5 renames what it loads; this asks it how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class Renaming:
    """How transformers names a checkpoint's tensors when it loads them into `model` (which may be on meta)."""

    def __init__(self, model: PreTrainedModel) -> None:
        transforms = get_model_conversion_mapping(model)
        self.renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.state = model.state_dict(keep_vars=True)

    def __call__(self, disk: str) -> str | None:
        """The name in memory of tensor `disk`; None if it is not loaded, or merged, split or transposed."""
        renamed, converter = rename_source_key(disk, self.renamings, self.converters, self.prefix, self.state)
        if renamed not in self.state and disk in self.state:
            return disk
        return renamed if renamed in self.state and converter is None else None


def memory_to_disk(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, str]:
    """Name in memory -> name on disk, for every tensor of the checkpoint that `model` loads as it is."""
    renaming = Renaming(model)
    pairs = ((renaming(disk), disk) for disk in disk_names)
    return {memory: disk for memory, disk in pairs if memory is not None}


def disk_name(model: PreTrainedModel, memory: str, candidates: Iterable[str]) -> str | None:
    """The first of `candidates` that transformers loads as `memory`."""
    renaming = Renaming(model)
    return next((name for name in candidates if renaming(name) == memory), None)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Head -> embedding, where the class could tie them; whether they are tied is for the file to say."""
    keys = model._tied_weights_keys
    return dict(keys) if isinstance(keys, Mapping) else {}
