"""A base model with a guard's adapters, as PEFT attaches them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from ...export.checkpoint.headers import Checkpoint, read_shard
from ...export.checkpoint.merge import NAME, WEIGHTS_FILE
from ...export.fold import Fold
from ...export.formats.lora import BIASED, Adapted, folders
from ...guard.base.errors import InputError, first_line
from ...guard.base.remote_code import trusted
from ...guard.model.vlm import auto_class
from .streamed import streamed

LOAD_BELOW_BYTES = 512 * 2**20
"""Checkpoints up to this size are loaded by transformers itself; of larger ones the names and shapes are compared."""


@contextmanager
def running_adapted(adapted: Adapted, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The model, computing in `dtype`: loaded with its adapters by PEFT if it is small, else from the files."""
    if adapted.source.data_bytes > LOAD_BELOW_BYTES:
        with streamed(adapted.source, Fold(adapted.edits), dtype=dtype) as model:
            yield model
        return
    attached = attach(base_model(adapted.source, dtype), adapted.place)
    for name, parameter in attached.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    yield attached.get_base_model()


def attach(model: PreTrainedModel, folder: Path) -> Any:
    """This changes `model`: the adapters in `folder` are put on it and active, as the PeftModel that is returned.

    Raises InputError if PEFT cannot load them.
    """
    for place in folders(folder):
        read_shard(place, WEIGHTS_FILE)
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
