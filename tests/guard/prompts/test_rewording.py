"""Other wordings: the same request, of both sides of a pair alike, and of plain verb phrases only."""

from __future__ import annotations

import pytest

from guardfold.guard.fitting.calibration import BUILT_IN_BENIGN, load_benign
from guardfold.guard.prompts.prompts import load_anchors
from guardfold.guard.prompts.rewording import FORMS, reworded, verb_phrase


@pytest.mark.parametrize("form", FORMS)
def test_the_verb_phrase_of_every_form_is_found(form: str) -> None:
    assert verb_phrase(form.format("bake a cake at home")) == "bake a cake at home"


@pytest.mark.parametrize(
    "request_",
    ["What is rust?", "How to be kind?", "Explain how baking works.", "Tell me how the sun shines.", "bake a cake", ""],
)
def test_what_asks_for_no_deed_is_left_alone(request_: str) -> None:
    assert verb_phrase(request_) is None
    assert reworded([request_], 3) == []


def test_both_sides_of_a_pair_are_asked_alike_in_ways_other_than_theirs() -> None:
    pair = ["How to steal a car?", "How to wash a car?"]
    found = reworded(pair, 3)
    assert len(set(found)) == 3 and tuple(pair) not in found
    for harmful, harmless in found:
        assert harmful.replace("steal", "wash") == harmless
        assert (verb_phrase(harmful), verb_phrase(harmless)) == ("steal a car", "wash a car")
    assert reworded(pair, 3) == found
    assert reworded(["How to steal a car?", "What is a car?"], 3) == []


def test_most_built_in_pairs_and_many_near_misses_can_be_said_otherwise() -> None:
    anchors = load_anchors()
    pairs = zip(anchors.harmful, anchors.harmless, strict=True)
    assert sum(bool(reworded(pair, 1)) for pair in pairs) > 0.5 * len(anchors)
    assert sum(bool(verb_phrase(p.text)) for p in load_benign(BUILT_IN_BENIGN) if p.near) > 50
