"""The residual projection: what it does to a running model, in a file, and that weights refuse it by name."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from torch import Tensor
from zoo import random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import ResidualProjection
from guardfold.guard.model.vlm import VLM

BASES = {0: random_basis(2, 32, 1), 2: random_basis(1, 32, 2)}


def steered(states: Tensor, basis: Tensor, strength: float, alpha: float) -> Tensor:
    """VLM-Guard's equations, vector by vector."""
    out = states.clone()
    for place in torch.cartesian_prod(*(torch.arange(size) for size in states.shape[:-1])).tolist():
        h = states[tuple(place)]
        component = sum((h @ v) * v for v in basis)
        opened = float(h @ basis[0] > 0)
        out[tuple(place)] = h - strength * component + alpha * opened * component
    return out


@pytest.mark.parametrize(("strength", "alpha"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.25, 2.0)])
def test_it_acts_on_what_decoder_layers_return(tiny: VLM, strength: float, alpha: float) -> None:
    for batch in reference.batches(tiny.processor).values():
        with attached(tiny.model, Guard((ResidualProjection(BASES, strength, alpha),))):
            got = reference.logits(tiny.model, batch)
        with ExitStack() as stack:
            for layer, basis in BASES.items():
                change = partial(steered, basis=basis, strength=strength, alpha=alpha)
                stack.enter_context(reference.output_changed(tiny.model.model.language_model.layers[layer], change))
            expected = reference.logits(tiny.model, batch)
        assert reference.distance(got, expected) <= 1e-5
        assert reference.distance(got, reference.logits(tiny.model, batch)) > 1e-3


def test_ungated_and_in_full_it_leaves_nothing_along_v(tiny: VLM) -> None:
    seen: list[Tensor] = []
    layer = tiny.model.model.language_model.layers[2]
    with attached(tiny.model, Guard((ResidualProjection(BASES),))):
        handle = layer.register_forward_hook(lambda _m, _a, out: seen.append(reference_states(out)))
        reference.logits(tiny.model, reference.batches(tiny.processor)["image"])
        handle.remove()
    assert (seen[0] @ BASES[2].T).norm() <= 1e-6 * seen[0].norm()


def reference_states(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_it_survives_its_file(tmp_path: Path) -> None:
    guard = Guard((ResidualProjection(BASES, 0.5, 1.5),))
    guard.save(tmp_path / "guard.safetensors")
    loaded = Guard.load(tmp_path / "guard.safetensors")
    assert loaded.describe() == guard.describe()
    (each,) = loaded.interventions
    assert isinstance(each, ResidualProjection)
    (kept,) = guard.interventions
    assert isinstance(kept, ResidualProjection)
    assert all(torch.equal(each.bases[layer], kept.bases[layer]) for layer in BASES)
    assert all(torch.allclose(kept.bases[layer].float(), basis) for layer, basis in BASES.items())
    assert not loaded.in_weights


@pytest.mark.parametrize("alpha", [-1.0, float("inf"), float("nan")])
def test_alpha_that_makes_no_sense(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        ResidualProjection(BASES, 1.0, alpha)


def test_weights_refuse_it_by_name_and_say_what_takes_it(tiny_folder: Path) -> None:
    checkpoint = Checkpoint.open(tiny_folder)
    with pytest.raises(InputError, match="residual-projection: weights cannot hold it; export it with --format onnx"):
        fold(Guard((ResidualProjection(BASES),)), family_of(checkpoint), checkpoint.shapes)
