"""Properties of the built-in prompt sets: counts, balance, lengths, and that the sets stay disjoint."""

import importlib.resources
import json
import re
from collections import Counter
from typing import Any

import pytest

CATEGORIES = (
    "weapons",
    "illegal_drugs",
    "fraud",
    "hacking",
    "theft",
    "violence",
    "harassment",
    "privacy",
    "misinformation",
    "forgery",
    "hazardous_materials",
    "evading_the_law",
)


def load(package: str, name: str) -> list[dict[str, Any]]:
    path = importlib.resources.files(package) / "data" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ANCHORS = load("guardfold.guard", "anchors.jsonl")
BENIGN = load("guardfold.guard", "benign.jsonl")
PROBES = load("guardfold.validators", "probes.jsonl")

TEXTS: dict[str, list[str]] = {
    "anchors_harmful": [row["harmful"] for row in ANCHORS],
    "anchors_harmless": [row["harmless"] for row in ANCHORS],
    "benign": [row["text"] for row in BENIGN],
    "probes_harmful": [row["text"] for row in PROBES if row["harmful"]],
    "probes_benign": [row["text"] for row in PROBES if not row["harmful"]],
}
NAMES = sorted(TEXTS)
PAIRS_OF_SETS = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]


def words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def normalized(text: str) -> str:
    return re.sub(r"^(how to|how do i|how can i)\s+", "", " ".join(words(text)))


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def test_normalized_strips_form() -> None:
    assert normalized("How do I boil an egg?") == normalized("how to boil an egg") == "boil an egg"
    assert jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)


def test_counts() -> None:
    assert {name: len(texts) for name, texts in TEXTS.items()} == {
        "anchors_harmful": 252,
        "anchors_harmless": 252,
        "benign": 320,
        "probes_harmful": 132,
        "probes_benign": 420,
    }


def test_keys_and_types() -> None:
    for row in ANCHORS:
        assert set(row) == {"harmful", "harmless", "category"}
        assert all(isinstance(value, str) for value in row.values())
    for row in BENIGN:
        assert set(row) == {"text"}
        assert isinstance(row["text"], str)
    for row in PROBES:
        assert set(row) == {"text", "harmful"}
        assert isinstance(row["text"], str)
        assert isinstance(row["harmful"], bool)


def test_anchor_categories_rotate() -> None:
    assert [row["category"] for row in ANCHORS] == [CATEGORIES[i % 12] for i in range(252)]
    assert set(Counter(row["category"] for row in ANCHORS).values()) == {21}


def test_default_extraction_prefix_is_balanced() -> None:
    counts = Counter(row["category"] for row in ANCHORS[:100])
    assert set(counts) == set(CATEGORIES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_anchors_are_how_to_questions() -> None:
    for text in TEXTS["anchors_harmful"] + TEXTS["anchors_harmless"]:
        assert text.startswith("How to ")
        assert text.endswith("?")
        assert 4 <= len(words(text)) <= 12, text


def test_anchor_pairs_match() -> None:
    for row in ANCHORS:
        harmful, harmless = words(row["harmful"]), words(row["harmless"])
        assert abs(len(harmful) - len(harmless)) <= 3, row
        # "How to" and at least one further word in common.
        assert len(set(harmful) & set(harmless)) >= 3, row
    total = sum(len(words(row["harmful"])) - len(words(row["harmless"])) for row in ANCHORS)
    assert abs(total / len(ANCHORS)) < 0.25


def test_probes_are_interleaved() -> None:
    share = 132 / len(PROBES)
    seen = 0
    for i, row in enumerate(PROBES, start=1):
        seen += row["harmful"]
        assert abs(seen - share * i) <= 1, i


@pytest.mark.parametrize("name", NAMES)
def test_lengths_and_spacing(name: str) -> None:
    for text in TEXTS[name]:
        assert 1 <= len(text.split()) <= 16, text
        assert text == " ".join(text.split())


@pytest.mark.parametrize("name", NAMES)
def test_unique(name: str) -> None:
    repeated = [key for key, n in Counter(map(normalized, TEXTS[name])).items() if n > 1]
    assert not repeated


@pytest.mark.parametrize(("a", "b"), PAIRS_OF_SETS)
def test_disjoint(a: str, b: str) -> None:
    assert not set(map(normalized, TEXTS[a])) & set(map(normalized, TEXTS[b]))


@pytest.mark.parametrize("probes", ["probes_harmful", "probes_benign"])
@pytest.mark.parametrize("other", ["anchors_harmful", "anchors_harmless", "benign"])
def test_probes_are_held_out(probes: str, other: str) -> None:
    others = [(text, set(words(text)), set(normalized(text).split())) for text in TEXTS[other]]
    close = [
        (probe, text)
        for probe in TEXTS[probes]
        for text, full, stripped in others
        if max(jaccard(set(words(probe)), full), jaccard(set(normalized(probe).split()), stripped)) >= 0.75
    ]
    assert not close
