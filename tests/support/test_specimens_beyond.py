"""Every tiny model beyond the writers' table builds, runs each modality and looks at its pictures."""

from __future__ import annotations

import pytest
import torch
from specimens import Inputs, Knobs, Specimen, build
from specimens.beyond import BEYOND, NOT_DECODERS, UNBUILDABLE_BEYOND
from specimens.exact import exact
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

NEVER_TIED = {"muse_spark", "nemotron_h_omni", "nemotron_h_omni+latent", "inkling2", "inkling_mm_model", "cosmos3_edge"}
KNOBS = Knobs(width=48, kv_heads=4, tied=True, bias=False)


def changed(inputs: Inputs) -> Inputs:
    """The same prompt about other pictures, or other sounds."""
    return {name: 0.5 * value + value.roll(1, 1) if raw(value) else value for name, value in inputs.items()}


def raw(value: object) -> bool:
    """Whether these are pixels or samples: nothing else is floating point and has more than one dimension."""
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.is_floating_point()


@pytest.mark.parametrize("specimen", BEYOND, ids=lambda specimen: specimen.name)
def test_has_its_knobs_and_runs_every_modality(specimen: Specimen) -> None:
    with exact(), torch.no_grad():
        model = build(specimen, KNOBS)
        embedding = model.get_input_embeddings().weight
        head = next(module.weight for name, module in model.named_modules() if name.endswith("lm_head"))
        assert embedding.shape[-1] == KNOBS.width
        assert (head is embedding) == (specimen.name not in NEVER_TIED)
        for modality, inputs in specimen.inputs(model.config).items():
            logits = model(**inputs).logits
            assert logits.isfinite().all()
            if modality != "text" and any(map(raw, inputs.values())):
                assert (model(**changed(inputs)).logits - logits).abs().max() > 1e-3, modality


@pytest.mark.parametrize("specimen", BEYOND, ids=lambda specimen: specimen.name)
def test_padding_is_on_the_left_and_rows_differ_in_length(specimen: Specimen) -> None:
    mask = specimen.inputs(specimen.config(Knobs()))["text"]["attention_mask"]
    assert mask.shape[0] == 2
    assert mask[:, -1].all()
    assert mask.sum(1).unique().numel() == 2


def test_every_name_is_a_known_image_to_text_model() -> None:
    built = {specimen.name.split("+")[0] for specimen in BEYOND}
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert built | set(NOT_DECODERS) | set(UNBUILDABLE_BEYOND) <= known
    assert not built & (set(NOT_DECODERS) | set(UNBUILDABLE_BEYOND))
