"""Hidden states of last prompt tokens: the right ones, from batches as from single prompts, and no work above them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import torch
from torch import nn
from zoo import Tiny, corners, name_of, variations

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting.directions import extract
from guardfold.guard.fitting.states import batch_states, prompt_states
from guardfold.guard.model.vlm import VLM, load
from guardfold.guard.prompts.image_kinds import ImageKind
from guardfold.guard.prompts.prompts import Anchors, Prompt, encode, illustrated

TEXTS = ("how to walk ?", "why do some people prefer to bake bread at home and usually walk to work ?", "paint a wall")
PROMPTS = [Prompt(text) for text in TEXTS]


@contextmanager
def counting(modules: dict[str, nn.Module]) -> Iterator[dict[str, int]]:
    """name -> how often the module ran."""
    counts = dict.fromkeys(modules, 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["text", "shape"])
@pytest.mark.parametrize("shape", variations() + corners(), ids=name_of)
def test_a_padded_batch_gives_the_states_of_each_prompt_alone(shape: Tiny, kind: ImageKind) -> None:
    vlm, layers = VLM(shape.model(), shape.processor(), None), [0, 1, 2]  # type: ignore[arg-type]
    vlm.processor.tokenizer.padding_side = "left"
    prompts = illustrated(PROMPTS, kind)
    mask = encode(vlm, prompts)["attention_mask"]
    assert not mask.all()
    together = batch_states(vlm, prompts, layers)
    for row, prompt in enumerate(prompts):
        alone = batch_states(vlm, [prompt], layers)
        for layer in layers:
            assert reference.distance(together[layer][row], alone[layer][0]) <= 1e-5


def test_the_states_are_those_that_transformers_reports(tiny: VLM) -> None:
    batch: Any = encode(tiny, illustrated(PROMPTS[1:2], "noise"))
    with torch.inference_mode():
        reported = tiny.model(**batch, output_hidden_states=True).hidden_states
    states = batch_states(tiny, illustrated(PROMPTS[1:2], "noise"), [0, 1])
    for layer in (0, 1):
        assert reference.distance(states[layer], reported[layer + 1][:, -1]) <= 1e-5


def test_a_picture_changes_the_states_and_its_kind_does_too(tiny: VLM) -> None:
    kinds: list[ImageKind] = ["text", "blank", "noise", "shape", "typographic"]
    seen = [prompt_states(tiny, PROMPTS[:1], [2], "states", kind)[2] for kind in kinds]
    for i, first in enumerate(seen):
        assert all(reference.distance(first, second) > 1e-4 for second in seen[i + 1 :])


@pytest.mark.parametrize("layers", [[0], [1], [0, 1], [1, 0], [2]])
def test_only_what_is_asked_for_and_nothing_above_it_runs(tiny: VLM, layers: list[int]) -> None:
    model: Any = tiny.model
    modules = {str(number): layer for number, layer in enumerate(tiny.layers)}
    modules |= {"norm": model.model.language_model.norm, "head": model.lm_head}
    with counting(modules) as runs:
        states = prompt_states(tiny, PROMPTS, layers, "states", "blank")
    assert set(states) == set(layers)
    assert all(each.shape == (len(PROMPTS), tiny.width) and each.dtype == torch.float32 for each in states.values())
    assert runs == {str(n): int(n <= max(layers)) for n in range(3)} | {"norm": 0, "head": 0}


def test_no_hooks_are_left(tiny: VLM) -> None:
    before = reference.hooks_on(tiny.model)
    batch_states(tiny, PROMPTS, [0, 1])
    assert reference.hooks_on(tiny.model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_naming_the_first_layer_that_suffers(
    tiny_folder: Any, value: float
) -> None:
    vlm = load(tiny_folder, "cpu", torch.float32)
    layer: Any = vlm.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[0, 0] = value
    with pytest.raises(InputError, match=r"^layer 1: NaN or Inf in the hidden states"):
        prompt_states(vlm, PROMPTS, [0, 1, 2], "states")
    anchors = Anchors(TEXTS + TEXTS[:1], TEXTS[::-1] + TEXTS[:1])
    with pytest.raises(InputError, match=r"^layer 2: NaN or Inf"):
        extract(vlm, anchors, [2])
    assert all(torch.isfinite(each).all() for each in prompt_states(vlm, PROMPTS, [0], "states").values())


def test_more_prompts_than_a_batch_holds_keep_their_order(tiny: VLM) -> None:
    prompts = [PROMPTS[i % 3] for i in range(tiny.batch_size + 5)]
    states = prompt_states(tiny, prompts, [1], "states")[1]
    alone = prompt_states(tiny, PROMPTS, [1], "states")[1]
    assert len(states) == len(prompts)
    assert reference.distance(states, torch.stack([alone[i % 3] for i in range(len(prompts))])) <= 1e-5
