"""What a guard means in a running model, and that the model is as it was afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import Tiny, corners, name_of, random_basis, variations

from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard, Intervention
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import SharedProjection, SublayerProjection, TwoPass
from guardfold.guard.interventions.base import project_out
from guardfold.guard.model.vlm import VLM

MODELS = variations() + corners()
CLOSE = 1e-5


@given(rank=st.integers(1, 8), seed=st.integers(0, 2**32), strength=st.floats(0.05, 1))
@settings(max_examples=30, deadline=None)
def test_project_out_removes_its_share_of_the_component_and_nothing_else(rank: int, seed: int, strength: float) -> None:
    basis = random_basis(rank, 16, seed)
    states = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed))
    kept = project_out(states, basis, strength)
    assert torch.allclose(kept @ basis.T, (1 - strength) * states @ basis.T, atol=1e-5)
    rest = torch.eye(16) - basis.T @ basis
    assert torch.allclose(kept @ rest, states @ rest, atol=1e-5)


@given(rank=st.integers(1, 8), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_project_out_is_idempotent_at_full_strength(rank: int, seed: int) -> None:
    basis = random_basis(rank, 16, seed)
    once = project_out(torch.randn(7, 16, generator=torch.Generator().manual_seed(seed)), basis, 1.0)
    assert torch.allclose(project_out(once, basis, 1.0), once, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_project_out_keeps_the_dtype_and_rounds_only_at_the_end(dtype: torch.dtype) -> None:
    basis, states = random_basis(2, 16), torch.randn(9, 16).to(dtype)
    exact = reference.without(states.double(), basis.double())
    got = project_out(states, basis, 1.0)
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= max(torch.finfo(dtype).eps, 1e-6) * states.abs().max()


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("shape", MODELS, ids=name_of)
def test_sublayer_projection_acts_on_what_attention_and_mlp_return(shape: Tiny, strength: float) -> None:
    model, bases = shape.model(), {0: random_basis(1, shape.width, 1), 2: random_basis(3, shape.width, 2)}
    guard = Guard((SublayerProjection(bases, strength),))
    for batch in reference.batches(shape.processor()).values():
        with attached(model, guard):
            got = reference.logits(model, batch)
        with reference.projected_sublayers(model, bases, strength):
            expected = reference.logits(model, batch)
        assert reference.distance(got, expected) <= CLOSE
        assert reference.distance(got, reference.logits(model, batch)) > 100 * CLOSE


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("shape", MODELS, ids=name_of)
def test_shared_projection_takes_v_out_of_everything_written_to_the_stream(shape: Tiny, strength: float) -> None:
    model, basis = shape.model(), random_basis(2, shape.width)
    guard = Guard((SharedProjection(basis, strength),))
    for batch in reference.batches(shape.processor()).values():
        with attached(model, guard):
            got = reference.logits(model, batch)
        with reference.projected_stream(model, basis, strength):
            expected = reference.logits(model, batch)
        assert reference.distance(got, expected) <= CLOSE
        assert reference.distance(got, reference.logits(model, batch)) > 100 * CLOSE


def test_with_the_shared_projection_the_readers_see_nothing_along_v(tiny: VLM) -> None:
    basis, seen = random_basis(2, tiny.width), []
    text: Any = tiny.model.model.language_model
    readers = [
        text.norm,
        *(n for layer in text.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    with attached(tiny.model, Guard((SharedProjection(basis),))):
        handles = [norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for norm in readers]
        reference.logits(tiny.model, reference.batches(tiny.processor)["image"])
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 * len(text.layers) + 1
    assert max(float((states @ basis.T).norm() / states.norm()) for states in seen) <= 1e-6


def test_interventions_act_together_in_order(tiny: VLM) -> None:
    first, second = random_basis(1, tiny.width, 1), random_basis(2, tiny.width, 2)
    batch = reference.batches(tiny.processor)["text"]
    for order in ((first, second), (second, first)):
        with attached(tiny.model, Guard(tuple(SublayerProjection({1: basis}) for basis in order))):
            got = reference.logits(tiny.model, batch)
        first_hooks, then = (reference.projected_sublayers(tiny.model, {1: basis}) for basis in order)
        with first_hooks, then:
            assert reference.distance(got, reference.logits(tiny.model, batch)) <= CLOSE


GUARDS: dict[str, Intervention] = {
    "sublayers": SublayerProjection({0: random_basis(1, 32), 2: random_basis(2, 32)}),
    "shared": SharedProjection(random_basis(1, 32)),
    "two-pass": TwoPass({1: random_basis(1, 32)}, alpha=3.0),
}


@pytest.mark.parametrize("kind", GUARDS)
@pytest.mark.parametrize("raises", [False, True], ids=["normal exit", "exception"])
def test_afterwards_the_model_is_as_it_was(tiny: VLM, kind: str, raises: bool) -> None:
    batch, guard = reference.batches(tiny.processor)["image"], Guard((GUARDS[kind],))
    before, hooks = reference.logits(tiny.model, batch), reference.hooks_on(tiny.model)
    leaving = pytest.raises(RuntimeError, match="inside") if raises else nullcontext()
    with leaving, attached(tiny.model, guard, {1: torch.ones(1, tiny.width)}):
        assert reference.hooks_on(tiny.model) > hooks
        assert not torch.equal(reference.logits(tiny.model, batch), before)
        if raises:
            raise RuntimeError("inside")
    assert reference.hooks_on(tiny.model) == hooks
    assert torch.equal(reference.logits(tiny.model, batch), before)


@pytest.mark.parametrize(
    ("intervention", "says"),
    [
        (SublayerProjection({0: random_basis(1, 48)}), "hidden size is 32"),
        (SharedProjection(random_basis(1, 16)), "hidden size is 32"),
        (SublayerProjection({1: random_basis(1, 32), 3: random_basis(1, 32)}), "last layer is 2"),
        (TwoPass({7: random_basis(1, 32)}), "last layer is 2"),
    ],
)
def test_a_guard_that_does_not_fit_is_refused(tiny: VLM, intervention: Any, says: str) -> None:
    with pytest.raises(InputError, match=says), attached(tiny.model, Guard((intervention,)), {}):
        pytest.fail("attached")


def test_two_pass_needs_the_text_states_and_leaves_nothing_behind_without(tiny: VLM) -> None:
    guard = Guard((SublayerProjection({0: random_basis(1, 32)}), TwoPass({1: random_basis(1, 32)})))
    hooks = reference.hooks_on(tiny.model)
    with pytest.raises(InputError, match="text-only states"), attached(tiny.model, guard):
        pytest.fail("attached")
    assert reference.hooks_on(tiny.model) == hooks


def test_directions_of_unequal_width_are_refused() -> None:
    with pytest.raises(InputError):
        Guard((SublayerProjection({0: random_basis(1, 32), 1: random_basis(1, 48)}),)).check_fits(3, 32)


@pytest.mark.parametrize("empty", [SublayerProjection, TwoPass])
def test_an_intervention_without_layers_is_refused(empty: Any) -> None:
    bases: Mapping[int, Tensor] = {}
    with pytest.raises(InputError):
        Guard((empty(bases),)).check_fits(3, 32)


def test_a_guard_without_interventions_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        Guard(())
