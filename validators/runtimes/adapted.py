"""A base model with a guard's adapters: as PEFT attaches them, and as a checkpoint whose weights had them merged."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ...export.checkpoint.edits import Edit, Folded
from ...export.checkpoint.headers import Checkpoint, TensorInfo, read_shard
from ...export.checkpoint.merge import NAME, updates
from ...export.fold import Fold
from ...export.formats.lora import BIASED, WEIGHTS_FILE, folders
from ...guard.base.errors import InputError, first_line
from ...guard.base.remote_code import trusted
from ...guard.model.vlm import auto_class
from .streamed import streamed

LOAD_BELOW_BYTES = 512 * 2**20
"""Checkpoints up to this size are loaded by transformers itself; of larger ones the names and shapes are compared."""


@dataclass(frozen=True)
class Adapted:
    """The checkpoint `source` with the adapters in `place`, to be read like a checkpoint in which they were merged."""

    source: Checkpoint
    place: Path

    @property
    def folder(self) -> Path:
        """Where the model's config is."""
        return self.source.folder

    @cached_property
    def edits(self) -> dict[str, list[Edit]]:
        """Tensor on disk -> what the adapters make of it."""
        found: dict[str, list[Edit]] = {}
        for folder in folders(self.place):
            for name, edits in updates(self.source, folder).items():
                found.setdefault(name, []).extend(edits)
        return found

    def info(self, name: str) -> TensorInfo:
        """Tensor `name`; F64, for nothing is rounded to the checkpoint's dtype."""
        info = self.source.info(name)
        return TensorInfo(name, "F64", info.shape, 0, 0)

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Rows first:last of tensor `name` with the adapters merged, float32 or better."""
        folded = Folded(partial(self.source.read, name), self.source.info(name).shape, self.edits.get(name, ()))
        return folded.rows(first, last)

    @contextmanager
    def running(self, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
        """The model, computing in `dtype`: loaded with its adapters by PEFT if it is small, else from the files."""
        if self.source.data_bytes > LOAD_BELOW_BYTES:
            with streamed(self.source, Fold(self.edits), dtype=dtype) as model:
                yield model
            return
        attached = attach(base_model(self.source, dtype), self.place)
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
        yield attached.get_base_model()


def attach(model: PreTrainedModel, folder: Path) -> Any:
    """This changes `model`: the adapters in `folder` are put on it and active, as the PeftModel that is returned.

    Raises InputError if PEFT cannot load them.
    """
    for each in folders(folder):
        read_shard(each, WEIGHTS_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a tied embedding is meant to be adapted alone
            adapted: Any = PeftModel.from_pretrained(model, str(folder), NAME)
            if (folder / BIASED) in folders(folder):
                adapted.load_adapter(str(folder / BIASED), BIASED)
                adapted.base_model.set_adapter([NAME, BIASED], inference_mode=True)
    except Exception as error:  # foreign files can break PEFT in any way
        raise InputError(f"{folder}: PEFT cannot load the adapter ({first_line(error)})") from error
    return adapted.eval()


def base_model(source: Checkpoint, dtype: torch.dtype | None = None) -> Any:
    """Loads the model of `source` as transformers does, in its own dtype by default."""
    return auto_class(source.config).from_pretrained(
        source.folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, trust_remote_code=trusted()
    )
