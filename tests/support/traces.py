"""Graphs are traced on tensors without values: models of one config have the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats.onnx.graphs import Traced
from guardfold.guard.guard import Guard

FOR_CLIENTS = "transformers.js_config"
"""An entry of config.json that is no part of the model's."""


@contextmanager
def traced_once() -> Iterator[None]:
    """While the block runs, a config, compute dtype and traced guard are traced once; weights are read every time."""
    kept: dict[tuple[Any, ...], Traced] = {}
    trace = Traced.of

    def once(checkpoint: Checkpoint, compute: torch.dtype, guard: Guard | None) -> Traced:
        config = {name: value for name, value in checkpoint.config.items() if name != FOR_CLIENTS}
        key = repr(config), compute, guard and guard.hash
        if key not in kept:
            kept[key] = trace(checkpoint, compute, guard)
        return replace(kept[key], checkpoint=checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traced, "of", once)
        yield
