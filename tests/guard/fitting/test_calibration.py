"""What a gate is fitted on: three parts that never meet, and prompts with answers read where they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from gates import speaking
from PIL import Image
from transformers import BatchFeature
from zoo import WORDS

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting import transcripts as transcripts_module
from guardfold.guard.fitting.calibration import (
    BUILT_IN_BENIGN,
    MIN_ANCHORS,
    MIN_BENIGN,
    PICTURED_EVERY,
    ROLES,
    Part,
    asked_of,
    deal,
    examples,
    folds_of,
    load_benign,
)
from guardfold.guard.fitting.last_tokens import FIRST_WORDS, Asked, read_last
from guardfold.guard.fitting.linear_probe import FOLDS
from guardfold.guard.fitting.states import prompt_states
from guardfold.guard.fitting.transcripts import (
    Page,
    Place,
    Transcripts,
    Usage,
    answer,
    answer_logits,
    last_readings,
    pages,
)
from guardfold.guard.fitting.transcripts import read as read_transcripts
from guardfold.guard.model.roles import mlp_parts
from guardfold.guard.model.vlm import VLM, image_token_of
from guardfold.guard.prompts.image_kinds import ANCHOR_KINDS, ImageKind
from guardfold.guard.prompts.prompts import Anchors, Prompt, encode, load_anchors

IMAGE_TOKENS = 9
PICTURE = Image.new("RGB", (24, 24), "red")


def anchors(count: int) -> Anchors:
    return Anchors(tuple(f"harm {i}" for i in range(count)), tuple(f"help {i}" for i in range(count)))


def benign(plain: int, pictured: int = 0) -> list[Prompt]:
    return [Prompt(f"plain {i}") for i in range(plain)] + [Prompt(f"shown {i}", PICTURE) for i in range(pictured)]


def texts(part: Part) -> set[str]:
    return {p.text for group in (part.harmful, part.harmless, part.benign, part.pictured, part.near) for p in group}


@pytest.mark.parametrize("prompts", [benign(60), benign(60, 25), benign(0, 60)], ids=["plain", "mixed", "pictured"])
def test_the_three_parts_never_meet_and_leave_nothing_out(prompts: Sequence[Prompt]) -> None:
    parts = deal(anchors(50), prompts)
    assert tuple(parts) == ROLES == ("fit", "select", "test")
    assert [len(part.harmful) for part in parts.values()] == [35, 7, 8]
    seen = [texts(part) for part in parts.values()]
    assert set().union(*seen) == {*anchors(50).harmful, *anchors(50).harmless, *(p.text for p in prompts)}
    for one in range(3):
        for other in range(one):
            assert not seen[one] & seen[other]


def test_built_in_prompts_are_enough_and_their_parts_never_meet() -> None:
    seen = [texts(part) for part in deal(load_anchors(), load_benign(BUILT_IN_BENIGN)).values()]
    assert len(set().union(*seen)) == sum(map(len, seen))


def test_pairs_stay_together_and_dealing_is_repeatable() -> None:
    parts = deal(anchors(50), benign(60))
    for part in parts.values():
        assert [p.text.split()[1] for p in part.harmful] == [p.text.split()[1] for p in part.harmless]
        assert part.anchors.harmful == tuple(p.text for p in part.harmful)
        assert all(p.image is None for p in (*part.harmful, *part.harmless, *part.benign))
        assert part.pictured and all(p.image is not None for p in part.pictured)
    again = deal(anchors(50), benign(60))
    assert [texts(part) for part in parts.values()] == [texts(part) for part in again.values()]


def test_pictures_that_prompts_bring_are_kept() -> None:
    brought = [p for part in deal(anchors(50), benign(40, 20)).values() for p in part.pictured if p.image is PICTURE]
    assert {p.text for p in brought} == {f"shown {i}" for i in range(20)}


def test_near_misses_are_kept_apart() -> None:
    near = [Prompt(f"near {i}", near=True) for i in range(20)]
    parts = deal(anchors(50), [*benign(60), *near])
    assert {p.text for part in parts.values() for p in part.near} == {p.text for p in near}
    assert not any(p.near for part in parts.values() for p in (*part.benign, *part.pictured))


def test_whole_wordings_share_a_fold_and_what_is_common_or_unsaid_is_dealt_out() -> None:
    wordings = ["how"] * 50 + [f"rare {n % 7}" for n in range(42)] + [""] * 8
    folds = folds_of(wordings)
    for rare in (f"rare {n}" for n in range(7)):
        assert len({fold for fold, wording in zip(folds, wordings, strict=True) if wording == rare}) == 1
    assert len({fold for fold, each in zip(folds, wordings, strict=True) if each == "how"}) == FOLDS
    assert len(set(folds[92:])) == FOLDS
    assert set(folds) == set(range(FOLDS))


def test_everything_is_asked_with_and_without_a_picture_and_what_says_the_same_is_scored_together() -> None:
    pairs = Anchors(
        tuple(f"How to break lock {i}?" for i in range(50)),
        tuple(f"How to paint lock {i}?" for i in range(50)),
        tuple(f"way {i % 10}" for i in range(50)),
    )
    near = [Prompt(f"How do I kill weed {i}?", near=True) for i in range(20)]
    part = deal(pairs, [*benign(60, 5), *near])["fit"]
    asked = asked_of(part)
    for prompts, group in ((part.harmful, "harmful"), (part.harmless, "harmless"), (part.near, "near")):
        for prompt in prompts:
            deed = re.compile(rf"{prompt.text.split(maxsplit=3)[-1][:-1]}\b")
            rows = [row for row in asked if row.group == group and deed.search(row.prompt.text)]
            assert len({row.fold for row in rows}) == 1
            same = [row for row in rows if row.prompt.text == prompt.text]
            assert sorted(row.pictured for row in same) in ([False], [False, True])
            assert len(rows) > len(same) and not any(row.pictured for row in rows if row not in same)
        shown = [row for row in asked if row.group == group and row.pictured]
        assert len(shown) == math.ceil(len(prompts) / PICTURED_EVERY)
    plain = [row for row in asked if row.group == "benign"]
    assert {row.prompt.text for row in plain if not row.pictured} == {prompt.text for prompt in part.benign}
    assert len([row for row in plain if row.pictured]) == math.ceil(len(part.pictured) / PICTURED_EVERY)
    assert all(each.fold in range(FOLDS) for each in asked)


def test_last_tokens_are_read_as_every_position_is(speaker: VLM) -> None:
    asked = [Asked(prompt, "harmful", kind, 0) for prompt in ASKED for kind in ("text", "shape")]
    last = read_last(speaker, asked, [1, 2], lambda answer: "o" in answer, "reading")
    for kind in ("text", "shape"):
        expected = last_readings(speaker, ASKED, kind, 2, "last")
        assert torch.allclose(last.x[2][last.rows("harmful", kind)], expected, atol=1e-5)
    states = prompt_states(speaker, ASKED, [2], "states", "shape")
    assert torch.allclose(last.h[2][last.rows("harmful", "shape")], states[2], atol=1e-5)
    said = answer(speaker, ASKED, "answers", "text", FIRST_WORDS).answers
    told = [speaker.processor.batch_decode([each], skip_special_tokens=True)[0] for each in said]
    assert last.refused[last.rows("harmful", "text")].tolist() == ["o" in each for each in told]
    assert not last.rows("near").any()


@pytest.mark.parametrize(("pairs", "prompts"), [(MIN_ANCHORS - 1, 400), (400, MIN_BENIGN - 1), (0, 0)])
def test_too_few_of_either_are_refused(pairs: int, prompts: int) -> None:
    with pytest.raises(InputError, match=f"{pairs} anchor pairs and {prompts} benign prompts are too few") as error:
        deal(anchors(pairs), benign(prompts))
    assert "\n" not in str(error.value)
    assert len(deal(anchors(MIN_ANCHORS), benign(MIN_BENIGN))) == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ""}', "'text' is missing or not text"),
        ('{"txt": "a"}', "'text' is missing or not text"),
        ('{"text": 7}', "'text' is missing or not text"),
        ("{oops", "not sound JSON"),
        ("[1]", "not a JSON object"),
        ('{"text": "a", "image": "absent.png"}', "not a file inside"),
        ('{"text": "a", "image": "../secret.png"}', "not a file inside"),
        ('{"text": "a", "image": "benign.jsonl"}', "not a readable picture"),
    ],
)
def test_a_malformed_benign_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    PICTURE.save(tmp_path.parent / "secret.png")
    path = tmp_path / "benign.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(InputError, match=says) as error:
        load_benign(path)
    assert f"{path}, line 3" in str(error.value)
    assert "\n" not in str(error.value)


def test_benign_prompts_come_with_their_pictures(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "b.csv").write_text("text,image\nhello,\nwhat is it,a.png\n")
    plain, shown = load_benign(tmp_path / "b.csv")
    assert (plain.text, plain.image, shown.text) == ("hello", None, "what is it")
    assert shown.image is not None and shown.image.getpixel((3, 3)) == (255, 0, 0)


ASKED = tuple(
    Prompt(text)
    for text in (
        "how to bake bread ?",
        "do people usually walk to work and why do some of them prefer to travel ?",
        "open a lock",
        "paint the wall",
        "why ?",
        "steal a car",
    )
)
KINDS: tuple[ImageKind, ...] = ("text", "shape")


@pytest.fixture(scope="module")
def speaker(tiny_folder: Path) -> VLM:
    return speaking(tiny_folder)


def held(vlm: VLM, kind: ImageKind, tokens: int = 24) -> tuple[Transcripts, Page]:
    transcripts = answer(vlm, ASKED, "answers", kind, tokens)
    (page,) = pages(vlm, transcripts, "page")
    return transcripts, page


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_with_the_end_of_sequence_or_the_limit(speaker: VLM, kind: ImageKind) -> None:
    transcripts, _ = held(speaker, kind)
    for given in transcripts.answers:
        assert given and (given[-1] == 2 or len(given) == 24)
        assert 2 not in given[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_what_stands_there(speaker: VLM, kind: ImageKind) -> None:
    transcripts, page = held(speaker, kind)
    places, ids = page.places(3), page.inputs["input_ids"]
    for row, (prompt, given) in enumerate(zip(ASKED, transcripts.answers, strict=True)):
        alone: Any = speaker.processor.tokenizer(prompt.text)["input_ids"]
        words = [token for token in alone if token > 3]
        real = places[row][places[row] >= 0].tolist()
        images = IMAGE_TOKENS if kind == "shape" else 0
        assert real.count(Place.IMAGE) == images
        assert real.count(Place.LAST) == 1
        assert real.count(Place.ANSWER) == len(given)
        assert (
            real.count(Place.TEXT) == len(words) + 2 + 2 - 1
        )  # "user :" before and "assistant :" after, less the last
        last = places[row].tolist().index(Place.LAST)
        assert ids[row, last - 1 : last + 1].tolist() == speaker.processor.tokenizer("assistant :")["input_ids"][-2:]
        assert ids[row, last + 1 : last + 1 + len(given)].tolist() == list(given)
        assert places[row, last + 1 : last + 1 + len(given)].eq(Place.ANSWER).all()
        assert places[row, last + 1 + len(given) :].eq(-1).all()
        padding = int((ids[row, : last + 1] == 0).sum())
        assert places[row, :padding].eq(-1).all() and places[row, padding] >= 0
    assert len({int((row == -1).sum()) for row in places}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forced_logits_choose_what_was_generated(speaker: VLM, kind: ImageKind) -> None:
    transcripts, page = held(speaker, kind)
    logits = answer_logits(speaker.model, page)
    assert logits.dtype == torch.float32
    assert logits.argmax(-1).tolist() == [token for given in transcripts.answers for token in given]


def test_readings_are_what_the_mlp_read_at_every_place(speaker: VLM) -> None:
    transcripts, page = held(speaker, "shape", tokens=4)
    seen: list[torch.Tensor] = []
    module: Any = speaker.layers[2].mlp
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    answer_logits(speaker.model, page)
    handle.remove()
    places = page.places(3)
    got = read_transcripts(speaker, transcripts, [1, 2], "reading")[2]
    for place in Place:
        assert torch.allclose(got.at(place), seen[0][places == place], atol=1e-6)
    rest = got.but(Place.LAST)
    assert len(rest.x) == len(got.x) - len(ASKED)
    assert not len(rest.at(Place.LAST))
    assert torch.allclose(last_readings(speaker, ASKED, "shape", 2, "last"), got.at(Place.LAST), atol=1e-5)


def test_what_marks_the_kind_of_each_token_goes_on_as_text_over_the_answer(
    speaker: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's mm_token_type_ids, Gemma's token_type_ids: where they mark pictures, an answer is none."""
    transcripts, plain = held(speaker, "shape", tokens=3)

    def marked(vlm: VLM, prompts: Any) -> Any:
        batch = encode(vlm, prompts)
        kinds = (batch["input_ids"] == image_token_of(vlm.model.config)).int()
        return BatchFeature({**batch, "mm_token_type_ids": kinds})

    monkeypatch.setattr(transcripts_module, "encode", marked)
    (page,) = pages(speaker, transcripts, "page")
    found = page.inputs["mm_token_type_ids"]
    assert found.shape == page.inputs["input_ids"].shape and page.start == plain.start
    assert found[:, : page.start].any() and not found[:, page.start :].any()
    assert torch.equal(page.inputs["input_ids"], plain.inputs["input_ids"])


def test_reading_in_smaller_batches_finds_the_same_last_tokens(speaker: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = last_readings(speaker, ASKED, "shape", 1, "last")
    monkeypatch.setattr(VLM, "batch_size", property(lambda _self: 1))
    assert torch.allclose(last_readings(speaker, ASKED, "shape", 1, "last"), whole, atol=1e-5)


def test_usage_counts_every_real_position(speaker: VLM) -> None:
    transcripts, page = held(speaker, "text", tokens=3)
    usage: dict[int, Usage] = {}
    parts, seen = mlp_parts(speaker.layers[1]), []
    handle = parts.down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    answer_logits(speaker.model, page)
    handle.remove()
    read_transcripts(speaker, transcripts, [1], "reading", usage)
    real = seen[0][page.inputs["attention_mask"].bool()].abs()
    assert usage[1].positions == len(real)
    expected = real.mean(0) * parts.down.weight.detach().norm(dim=0)
    assert torch.allclose(usage[1].importance(parts.down.weight), expected, rtol=1e-4)


def test_examples_open_at_harmful_last_tokens_alone(speaker: VLM) -> None:
    part = Part(ASKED[:2], ASKED[2:4], ASKED[4:], (Prompt("paint a car", PICTURE),))
    (found,) = examples(speaker, part, [1], "part").values()
    assert tuple(found.harmful) == ANCHOR_KINDS
    for kind, x in found.harmful.items():
        assert torch.allclose(x, last_readings(speaker, ASKED[:2], kind, 1, "last"), atol=1e-5)
    assert len(found.positives) == 2 * len(ANCHOR_KINDS)
    assert len(found.other.at(Place.LAST)) == 2 * len(ANCHOR_KINDS) + 2 + 1
    expected = last_readings(speaker, ASKED[2:4], "noise", 1, "last")
    distances = torch.cdist(expected, found.other.at(Place.LAST)).min(1).values
    assert distances.max() <= 1e-3
    assert torch.cdist(found.positives, found.other.x).min() > 1e-2


def test_a_model_that_says_its_image_token_is_read_all_the_same(speaker: VLM) -> None:
    said = Transcripts(ASKED[:2], ((5, 3, 2), (6, 2)), "shape")
    assert len(read_transcripts(speaker, said, [1], "reading")[1].at(Place.ANSWER)) == 5


def test_reading_changes_nothing_in_the_model(speaker: VLM) -> None:
    hooks = reference.hooks_on(speaker.model)
    last_readings(speaker, ASKED, "text", 1, "last")
    assert reference.hooks_on(speaker.model) == hooks
    assert set(WORDS) >= {word for prompt in ASKED for word in prompt.text.split()}
