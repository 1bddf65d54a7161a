"""The tiny models are fit for tests: each builds, takes every modality, and looks at its pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specimens import Inputs, Knobs, Specimen, build
from specimens.exact import exact
from specimens.known import KNOWN
from torch import Tensor

SHAPES = [Knobs(), Knobs(width=48, kv_heads=4, tied=True)]


def logits(model: Any, inputs: Inputs) -> Tensor:
    cast = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad(), exact():
        return model(**cast).logits


def changed(inputs: Inputs) -> Inputs:
    """The same with other pictures."""
    return {name: -value if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("knobs", SHAPES, ids=["default", "wide"])
@pytest.mark.parametrize("specimen", KNOWN, ids=lambda specimen: specimen.name)
def test_a_specimen_takes_every_modality(specimen: Specimen, knobs: Knobs) -> None:
    model = build(specimen, knobs)
    assert model.config.get_text_config().hidden_size == knobs.width
    for modality, inputs in specimen.inputs(model.config).items():
        plain = logits(model, inputs)
        assert plain.isfinite().all(), modality
        assert modality == "text" or not torch.equal(plain, logits(model, changed(inputs))), modality
