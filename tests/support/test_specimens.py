"""The tiny models are fit for tests: each builds, takes every modality, and looks at its pictures.

With their default knobs, tests/export/families runs them all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from specimens import Inputs, Knobs, Specimen, build
from specimens.exact import exact
from specimens.known import KNOWN, REFUSED, UNBUILDABLE, UNTIED
from torch import Tensor

SHAPES = {
    "wide": Knobs(width=48, kv_heads=4, tied=True),
    "plain": Knobs(kv_heads=1, layers=2, bias=False),
}


def logits(model: Any, inputs: Inputs) -> Tensor:
    cast = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad(), exact():
        return model(**cast).logits


def changed(inputs: Inputs) -> Inputs:
    """The same with other pictures."""
    return {name: -value if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("knobs", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("specimen", KNOWN, ids=lambda specimen: specimen.name)
def test_a_specimen_takes_every_modality(specimen: Specimen, knobs: Knobs) -> None:
    model = build(specimen, knobs)
    assert model.config.get_text_config().hidden_size == knobs.width
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (knobs.tied and specimen.name not in UNTIED)
    modalities = specimen.inputs(model.config)
    assert {"text", "image", "images"} <= set(modalities)
    for modality, inputs in modalities.items():
        plain = logits(model, inputs)
        assert plain.dtype == torch.float64 and plain.isfinite().all(), modality
        assert modality == "text" or not torch.equal(plain, logits(model, changed(inputs))), modality


def test_in_exact_float64_stays_and_the_default_comes_back() -> None:
    values = torch.ones(2, dtype=torch.float64)
    with exact():
        made = [values.float(), values.to(torch.float32), torch.softmax(values, 0, dtype=torch.float32), torch.ones(2)]
    assert {tensor.dtype for tensor in made} == {torch.float64}
    assert torch.ones(2).dtype == values.float().dtype == torch.float32


def test_names_are_told_apart() -> None:
    names = [specimen.name for specimen in KNOWN]
    assert len(set(names)) == len(names) and set(names) >= UNTIED


@pytest.mark.parametrize("specimen", REFUSED, ids=lambda specimen: specimen.name)
def test_what_cannot_be_built_fails_as_said(specimen: Specimen) -> None:
    with pytest.raises((ImportError, AttributeError)) as error:
        build(specimen)
    assert UNBUILDABLE[specimen.name] in str(error.value)
