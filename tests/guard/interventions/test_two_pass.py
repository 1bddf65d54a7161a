"""VLM-Guard's step 3 as published, on hooks: where it steers, when, and that a KV cache changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch
from torch import Tensor
from zoo import random_basis

from guardfold.guard.fitting.states import text_states
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import TwoPass
from guardfold.guard.model.vlm import VLM
from guardfold.guard.prompts.prompts import Prompt, encode, illustrated

LAYER, ALPHA = 1, 40.0
SHORT, LONG = Prompt("how to walk home ?"), Prompt("why do some people prefer to bake bread and usually walk to work ?")


def separating(vlm: VLM, rank: int = 2) -> Tensor:
    """A basis whose first row has SHORT on its positive side and LONG on its negative one."""
    short, long = text_states(vlm, [SHORT, LONG], [LAYER])[LAYER]
    rows = torch.cat([(short / short.norm() - long / long.norm())[None], random_basis(rank - 1, vlm.width)])
    orthonormal = torch.linalg.qr(rows.T).Q.T
    return orthonormal * torch.sign((orthonormal * rows).sum(1, keepdim=True))


def states_after(vlm: VLM, prompts: Sequence[Prompt], guard: Guard | None) -> Tensor:
    """h of LAYER at every position, [batch, positions, d], under `guard`."""
    seen: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        seen.append(states)
        return states

    def run() -> None:
        layer: Any = vlm.layers[LAYER]
        with reference.output_changed(layer, keep):
            reference.logits(vlm.model, encode(vlm, prompts))

    if guard is None:
        run()
    else:
        with attached(vlm.model, guard, text_states(vlm, prompts, [LAYER])):
            run()
    return seen[0]


def answers(vlm: VLM, prompts: Sequence[Prompt], guard: Guard | None, **options: Any) -> list[list[int]]:
    batch, model = encode(vlm, prompts), vlm.model
    count = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False, **options}
    count["suppress_tokens"] = [model.config.image_token_id]  # a random model may say it, and no picture belongs to it

    def run() -> list[list[int]]:
        generated: Any = model.generate(**batch, **count)  # type: ignore[operator]
        return generated[:, batch["input_ids"].shape[1] :].tolist()

    if guard is None:
        return run()
    with attached(model, guard, text_states(vlm, prompts, [LAYER])):
        return run()


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("kind", [None, "blank"])
def test_steers_the_last_prompt_token_by_its_text_states_where_the_gate_is_open(
    tiny: VLM, project: bool, kind: Any
) -> None:
    basis, prompts = separating(tiny), illustrated([SHORT, LONG], kind)
    text = text_states(tiny, prompts, [LAYER])[LAYER]
    assert (text @ basis[0] > 0).tolist() == [True, False]
    plain = states_after(tiny, prompts, None)
    steered = states_after(tiny, prompts, Guard((TwoPass({LAYER: basis}, ALPHA, project),)))
    expected = reference.without(plain, basis) if project else plain.clone()
    expected[0, -1] += ALPHA * text[0] @ basis.T @ basis
    assert torch.allclose(steered, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert (steered[0, -1] - plain[0, -1]).norm() > plain[0, -1].norm()
    if not project:
        assert torch.equal(steered[:, :-1], plain[:, :-1])
        assert torch.equal(steered[1], plain[1])


def test_the_text_pass_leaves_the_picture_out(tiny: VLM) -> None:
    with_picture = text_states(tiny, illustrated([SHORT, LONG], "noise"), [LAYER])[LAYER]
    assert torch.equal(with_picture, text_states(tiny, [SHORT, LONG], [LAYER])[LAYER])


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("kind", [None, "shape"])
def test_generates_the_same_with_and_without_a_kv_cache(tiny: VLM, project: bool, kind: Any) -> None:
    guard, prompts = Guard((TwoPass({LAYER: separating(tiny)}, ALPHA, project),)), illustrated([SHORT, LONG], kind)
    cached = answers(tiny, prompts, guard, use_cache=True)
    assert cached == answers(tiny, prompts, guard, use_cache=False)
    unguarded = answers(tiny, prompts, None)
    assert cached[0] != unguarded[0]
    assert (cached[1] == unguarded[1]) or project


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_generated_was_steered_at_the_last_prompt_token_alone(tiny: VLM, use_cache: bool) -> None:
    """Read back as one text, steered at that one place, every generated token is the most likely next one."""
    basis, (batch, prompts) = separating(tiny), (encode(tiny, [SHORT]), [SHORT])
    spoken = answers(tiny, prompts, Guard((TwoPass({LAYER: basis}, ALPHA),)), use_cache=use_cache)
    ids = torch.cat([batch["input_ids"], torch.tensor(spoken)], dim=1)
    last = batch["input_ids"].shape[1] - 1
    steering = ALPHA * text_states(tiny, prompts, [LAYER])[LAYER][0] @ basis.T @ basis

    def steer(states: Tensor) -> Tensor:
        states = states.clone()
        states[0, last] += steering
        return states

    model: Any = tiny.model
    with reference.output_changed(tiny.layers[LAYER], steer), torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, last:-1].clone()
        logits[:, [model.config.image_token_id, model.config.text_config.eos_token_id]] = -torch.inf  # never said here
    assert logits.argmax(-1).tolist() == spoken[0]


@pytest.mark.parametrize("kind", [None, "shape"])
def test_a_left_padded_batch_generates_what_its_prompts_do_alone(tiny: VLM, kind: Any) -> None:
    guard, prompts = Guard((TwoPass({LAYER: separating(tiny)}, ALPHA),)), illustrated([SHORT, LONG], kind)
    together = answers(tiny, prompts, guard)
    assert together == [*answers(tiny, prompts[:1], guard), *answers(tiny, prompts[1:], guard)]


def test_alpha_scales_the_steering(tiny: VLM) -> None:
    basis, prompts = separating(tiny), [SHORT, LONG]
    plain = states_after(tiny, prompts, None)
    once, twice = (
        states_after(tiny, prompts, Guard((TwoPass({LAYER: basis}, a),))) - plain for a in (ALPHA, 2 * ALPHA)
    )
    assert torch.allclose(twice, 2 * once, rtol=1e-4, atol=1e-4)
    assert twice.abs().max() > 0
