"""Every family that has an alias, with a processor of its real class: asked, answered and read as it is published.

Those that need guardfold[vision] are marked `vision`; what the command line makes of each is in
tests/cli/test_every_family.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from real_processors import ALIKE, REAL
from reference import distance

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting.states import batch_states, forward
from guardfold.guard.fitting.transcripts import Transcripts, answer, answer_logits, pages, read
from guardfold.guard.model.processor import words_of
from guardfold.guard.model.roles import skipped_on_text
from guardfold.guard.model.vlm import ALIASES, VLM, image_token_of, load_model, opened
from guardfold.guard.prompts.prompts import Prompt, encode, illustrated

PROMPTS = [Prompt("how to walk ?"), Prompt("why do some people prefer to bake bread at home ?")]
KINDS = ("text", "shape")
FAMILIES = [pytest.param(alias, marks=[pytest.mark.vision] if family.vision else []) for alias, family in REAL.items()]
NOT_EXACT = {"lfm2-vl": 5e-3}
"""Whose own class says other things of a padded row than of the row alone: its convolutions see what is before them."""

PICTURED_ONLY = {"llama-vision": {1, 3}}
"""Layers that look at pictures and nothing else."""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VLM]:
    return {}


@pytest.fixture
def vlm(request: pytest.FixtureRequest, loaded: dict[str, VLM], tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """The family's model with its processor, as transformers loads them from a folder."""
    alias = request.param
    if alias not in loaded:
        folder = REAL[alias].save(tmp_path_factory.mktemp("real") / alias, layers=4)
        loaded[alias] = VLM(load_model(folder, "cpu", torch.float32), opened(folder), folder)
    return loaded[alias]


def test_every_alias_has_a_family_here() -> None:
    assert set(REAL) | set(ALIKE) == set(ALIASES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vlm", FAMILIES, indirect=True)
def test_prompts_in_a_batch_have_the_states_of_each_alone(vlm: VLM, kind: str, request: Any) -> None:
    prompts, layers = illustrated(PROMPTS, kind), list(range(len(vlm.layers)))
    assert not encode(vlm, prompts)["attention_mask"].all(), "nothing was padded"
    together = batch_states(vlm, prompts, layers)
    limit = NOT_EXACT.get(vlm.folder.name, 1e-5)
    for row, prompt in enumerate(prompts):
        alone = batch_states(vlm, [prompt], layers)
        assert max(distance(together[layer][row], alone[layer][0]) for layer in layers) <= limit


@pytest.mark.parametrize("vlm", FAMILIES, indirect=True)
def test_a_picture_is_seen_and_a_text_is_without_one(vlm: VLM) -> None:
    shown = [encode(vlm, illustrated(PROMPTS[:1], kind)) for kind in ("shape", "noise")]
    alone = encode(vlm, PROMPTS[:1])
    token = image_token_of(vlm.model.config)
    assert all((batch["input_ids"] == token).any() for batch in shown)
    assert not (alone["input_ids"] == token).any()
    with torch.inference_mode():
        one, other = (forward(vlm.model, batch, use_cache=False).logits[:, -1] for batch in shown)
    assert distance(one, other) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vlm", FAMILIES, indirect=True)
def test_answers_read_along_their_prompts_are_the_ones_given(vlm: VLM, kind: str) -> None:
    """What is said token by token with a cache is what one pass over prompt and answer says."""
    given = answer(vlm, PROMPTS, "answers", kind, tokens=6)
    (page,) = pages(vlm, given, "pages")
    logits = answer_logits(vlm.model, page).clone()
    logits[:, image_token_of(vlm.model.config)] = -torch.inf  # never said
    assert logits.argmax(-1).tolist() == [token for row in given.answers for token in row]


@pytest.mark.parametrize("vlm", FAMILIES, indirect=True)
def test_layers_that_a_text_skips_are_known(vlm: VLM) -> None:
    """The stream is there as the layer below left it; nothing can be read of their MLPs."""
    skipped = skipped_on_text(vlm.model)
    assert skipped == PICTURED_ONLY.get(vlm.folder.name, set())
    ran: set[int] = set()
    handles = [
        layer.register_forward_pre_hook(lambda *_, number=number: ran.add(number))
        for number, layer in enumerate(vlm.layers)
    ]
    with torch.inference_mode():
        forward(vlm.model, encode(vlm, PROMPTS), use_cache=False)
    for handle in handles:
        handle.remove()
    assert ran == set(range(len(vlm.layers))) - skipped
    states = batch_states(vlm, PROMPTS, range(len(vlm.layers)))
    for layer in skipped:
        assert torch.equal(states[layer], states[layer - 1])
        with pytest.raises(InputError, match=f"layer {layer}: does not run without a picture"):
            read(vlm, Transcripts(tuple(PROMPTS), ((), ())), [layer], "reading")
        assert len(read(vlm, Transcripts(tuple(PROMPTS), ((), ()), "shape"), [layer], "reading")[layer].x)


FORMS = {
    "paligemma": "answer en how to walk ?",
    "paligemma2": "answer en how to walk ?",
    "blip2": "Question: how to walk ? Answer:",
    "instructblip": "how to walk ?",
    "fuyu": "how to walk ?\n",
}


@pytest.mark.parametrize("vlm", [each for each in FAMILIES if each.values[0] in FORMS], indirect=True)
def test_families_without_a_template_are_asked_in_their_own_form(vlm: VLM) -> None:
    assert vlm.processor.chat_template is None
    assert words_of(vlm.processor, ("how to walk ?", None)) == FORMS[vlm.folder.name]


def test_every_family_without_a_template_has_a_form() -> None:
    assert {alias for alias, family in REAL.items() if family.template is None} == set(FORMS)


@pytest.mark.parametrize("vlm", ["paligemma", "paligemma2"], indirect=True)
def test_paligemma_sees_all_of_a_prompt_and_of_an_answer_what_is_before(vlm: VLM) -> None:
    batch = encode(vlm, PROMPTS[:1])
    assert vlm.processor.tokenizer.decode(batch["input_ids"][0]) == "<s>answer en how to walk ?\n"
    assert not batch["token_type_ids"].any() and "labels" not in batch
    (page,) = pages(vlm, answer(vlm, PROMPTS, "answers", "shape", tokens=3), "pages")
    kinds = page.inputs["token_type_ids"]
    assert not kinds[:, : page.start].any() and kinds[:, page.start :].all()


@pytest.mark.parametrize("vlm", ["blip2", "instructblip"], indirect=True)
def test_a_picture_that_a_class_insists_on_is_not_seen_by_a_text(vlm: VLM) -> None:
    batch = encode(vlm, PROMPTS)
    assert "pixel_values" in batch
    with torch.inference_mode():
        black = forward(vlm.model, batch, use_cache=False).logits
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        assert torch.equal(black, forward(vlm.model, batch, use_cache=False).logits)
