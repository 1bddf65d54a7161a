"""Properties of the built-in prompt sets: counts, balance, wordings, lengths, and that what fits a guard and what
measures it stay apart."""

import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

CATEGORIES = (
    *("weapons", "self_harm", "illegal_drugs", "stalking", "fraud", "animal_cruelty", "hacking"),
    *("election_interference", "theft", "money_laundering", "violence", "human_trafficking", "harassment"),
    *("counterfeit_goods", "privacy", "academic_and_medical_fraud", "misinformation", "arson", "forgery", "sabotage"),
    *("hazardous_materials", "impersonation", "evading_the_law", "wildlife_crime", "radicalisation", "tax_evasion"),
)
"""In the order in which anchors take turns."""

WORDINGS = {
    "how_to": r"how to",
    "how_do_i": r"how (do|can) i",
    "help_me": r"help me",
    "write_plan": r"write a plan",
    "give_way": r"give me (a|some) (ways?|trick|method)",
    "explain": r"explain",
    "tell_me": r"tell me",
    "best_way": r"what is the \w+ way",
    "i_want": r"i want",
    "i_need": r"i need",
    "teach_me": r"(teach|show) me",
    "steps": r"what are the steps|walk me through|outline",
    "draft": r"draft",
    "write": r"(write|create)(?! a plan)",
    "list": r"list",
    "describe": r"describe",
    "can_you": r"(can|could) you",
    "suggest": r"suggest",
    "what_should": r"what (should|can) i",
    "scenario": r"[^.?]+\. how (do|can) i",
    "is_there": r"is there",
    "some_ways": r"what are some",
    "trying": r"i'm (trying|looking|planning)",
    "would_be": r"what would be",
    "give_tips": r"give me (tips|advice|ideas)",
    "make_me": r"make me",
    "do_i_need": r"what do i need",
    "wants_to": r"my \w+ wants to [^.?]+\. (what|where|how|who) should",
    "come_up_with": r"come up with",
    "one_could": r"show how one could",
    "id_like": r"i'd like",
    "where": r"where can i",
    "please": r"please",
}
"""wording -> how its requests begin, in lower case."""

REQUEST = frozenset(
    "how to do can could i you me my help write a an plan give some way ways explain tell what is the best want need "
    "teach show are steps draft list describe suggest should someone in of for that and "
    "where would be please tips".split()
)
"""Words of which any request is made: a run of these with one other ("how can I get") is no content that two share."""

ASKING = ("Any", "Can", "Could", "How", "Is", "What", "Where", "Who")
"""How a sentence begins that ends in a question mark."""

BENIGN_KINDS = {"plain", "image", "near-miss"}


def read(package: str, name: str) -> str:
    return (importlib.resources.files(package) / "data" / name).read_text(encoding="utf-8")


def load(package: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read(package, name).splitlines()]


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
USED_IN_FITTING = ("anchors_harmful", "anchors_harmless", "benign")


def words(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text.lower()).split()


def normalized(text: str) -> str:
    return re.sub(r"^(how to|how do i|how can i)\s+", "", " ".join(words(text)))


def wordings(text: str) -> set[str]:
    return {name for name, opening in WORDINGS.items() if re.match(rf"({opening})\b", text.lower())}


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """The runs of `length` words in `text` of which at least two are not of those of which any request is made."""
    said = words(text)
    found = {tuple(said[i : i + length]) for i in range(len(said) - length + 1)}
    return {run for run in found if sum(word not in REQUEST for word in run) >= 2}


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """How often one of `positive` lies above one of `negative`; half counts where they are equal."""
    above = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return above / (len(positive) * len(negative))


def opening_scores(rows: Sequence[dict[str, Any]]) -> list[float]:
    """For each row, the share of harm among the rows that begin with the same two words.

    No classifier that sees two words ranks these rows better; one that has not seen them ranks them worse.
    """
    openings = [tuple(words(row["text"])[:2]) for row in rows]
    total = Counter(openings)
    harmful = Counter(opening for opening, row in zip(openings, rows, strict=True) if row["harmful"])
    return [harmful[opening] / total[opening] for opening in openings]


def by_harm(values: Iterable[float]) -> tuple[list[float], list[float]]:
    """`values`, one for each probe, of the harmful probes and of the benign ones."""
    each = list(zip(values, (row["harmful"] for row in PROBES), strict=True))
    return [value for value, harmful in each if harmful], [value for value, harmful in each if not harmful]


def test_measures() -> None:
    assert normalized("How do I boil an egg?") == normalized("how to boil an egg") == "boil an egg"
    assert jaccard({"a", "b"}, {"b", "c"}) == pytest.approx(1 / 3)
    assert runs("Tell me how to boil an egg at home.", 4) == {
        tuple(run.split()) for run in ("to boil an egg", "boil an egg at", "an egg at home")
    }
    assert auc([3, 2], [1, 2]) == 0.875
    texts = {"Steal it all": True, "Steal it": False, "Buy it now": False}
    assert opening_scores([{"text": t, "harmful": h} for t, h in texts.items()]) == [0.5, 0.5, 0]


def test_counts() -> None:
    kinds = Counter(row["kind"] for row in BENIGN)
    assert len(ANCHORS) >= 1300
    assert kinds["plain"] >= 1000 and kinds["near-miss"] >= 600 and kinds["image"] >= 100
    assert len(TEXTS["probes_harmful"]) >= 300
    assert len(TEXTS["probes_benign"]) >= 600
    assert sum(row["kind"] == "near-miss" for row in PROBES if not row["harmful"]) >= 200


def test_the_readme_counts_what_is_there() -> None:
    readme = read("guardfold.guard", "README.md")
    counts = {"anchors": f"{len(ANCHORS):,} pairs", "benign": f"{len(BENIGN):,}", "probes": f"{len(PROBES):,}"}
    for name, rows in counts.items():
        assert re.search(rf"^\| `\w+/data/{name}\.jsonl` \| {rows} \|", readme, re.M), name
    assert f"{len(TEXTS['probes_harmful'])} harmful" in readme
    assert f"{len(TEXTS['probes_benign'])} benign" in readme
    for kind, count in Counter(row["kind"] for row in BENIGN).items():
        assert f"{count:,} `{kind}`" in readme
    for category in CATEGORIES:
        assert category.replace("_", " ") in " ".join(readme.split())


def test_keys_and_types() -> None:
    for row in ANCHORS:
        assert list(row) == ["harmful", "harmless", "category", "wording"]
        assert all(isinstance(value, str) for value in row.values())
    for row in BENIGN:
        assert list(row) == ["text", "kind"]
        assert isinstance(row["text"], str) and row["kind"] in BENIGN_KINDS
    for row in PROBES:
        assert isinstance(row["text"], str) and isinstance(row["harmful"], bool)
        if row["harmful"]:
            assert set(row) == {"text", "harmful", "category", "kind"} and row["kind"] == "harmful"
        else:
            assert set(row) == {"text", "harmful", "kind"} and row["kind"] in BENIGN_KINDS


def test_harmful_probes_are_spread_over_the_categories() -> None:
    counts = Counter(row["category"] for row in PROBES if row["harmful"])
    assert set(counts) <= set(CATEGORIES) and len(counts) >= 20
    assert max(counts.values()) - min(counts.values()) <= 1


def test_anchor_categories_rotate() -> None:
    assert len(set(CATEGORIES)) == len(CATEGORIES) >= 20
    assert [row["category"] for row in ANCHORS] == [CATEGORIES[i % len(CATEGORIES)] for i in range(len(ANCHORS))]
    assert len(set(Counter(row["category"] for row in ANCHORS).values())) == 1


def test_both_sides_of_a_pair_have_the_wording_that_it_states() -> None:
    for row in ANCHORS:
        assert wordings(row["harmful"]) == wordings(row["harmless"]) == {row["wording"]}, row


def test_wordings_are_many_and_each_has_enough_pairs_to_be_held_out() -> None:
    counts = Counter(row["wording"] for row in ANCHORS)
    assert set(counts) == set(WORDINGS) and len(WORDINGS) >= 30
    assert min(counts.values()) >= 25
    assert counts["how_to"] <= 0.25 * len(ANCHORS)
    for category in CATEGORIES:
        assert len({row["wording"] for row in ANCHORS if row["category"] == category}) >= 20, category


@pytest.mark.parametrize("count", [100, 200, 400])
def test_any_stretch_of_anchors_holds_the_wordings_in_their_shares(count: int) -> None:
    shares = Counter(row["wording"] for row in ANCHORS)
    for start in range(len(ANCHORS) - count + 1):
        found = Counter(row["wording"] for row in ANCHORS[start : start + count])
        assert len(found) >= 30
        for wording, total in shares.items():
            assert abs(found[wording] - total * count / len(ANCHORS)) <= (9 if wording == "how_to" else 4), start


@pytest.mark.parametrize("name", ["anchors_harmful", "anchors_harmless"])
def test_anchors_are_short_plain_questions(name: str) -> None:
    for text in TEXTS[name]:
        assert 5 <= len(words(text)) <= 16, text
        assert re.fullmatch(r"([^.?!]+\. )?[^.?!]+[.?]", text), text
        assert text.endswith("?") == text.split(". ")[-1].startswith(ASKING), text


@pytest.mark.parametrize("name", ["anchors_harmful", "probes_harmful"])
def test_harmful_prompts_state_no_quantities(name: str) -> None:
    assert not [text for text in TEXTS[name] if re.search(r"\d", text.replace("3D", "").replace("two", ""))]


def test_anchor_pairs_differ_in_little() -> None:
    for row in ANCHORS:
        harmful, harmless = words(row["harmful"]), words(row["harmless"])
        assert abs(len(harmful) - len(harmless)) <= 2, row
        assert len(set(harmful) & set(harmless)) >= 3, row
    total = sum(len(words(row["harmful"])) - len(words(row["harmless"])) for row in ANCHORS)
    assert abs(total / len(ANCHORS)) < 0.05


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(BENIGN, lambda row: row["kind"]), (PROBES, lambda row: row["harmful"])],
    ids=["benign", "probes"],
)
def test_kinds_are_interleaved(rows: list[dict[str, Any]], kind: Any) -> None:
    shares = Counter(map(kind, rows))
    seen: Counter[Any] = Counter()
    for i, row in enumerate(rows, start=1):
        seen[kind(row)] += 1
        for each, total in shares.items():
            assert abs(seen[each] - total * i / len(rows)) <= 1.5, i


@pytest.mark.parametrize("name", NAMES)
def test_lengths_and_spacing(name: str) -> None:
    for text in TEXTS[name]:
        assert 2 <= len(text.split()) <= 30, text
        assert text == " ".join(text.split())
    assert sum(len(text.split()) < 4 for text in TEXTS[name]) <= 0.02 * len(TEXTS[name])


def test_benign_prompts_begin_in_many_ways_and_in_the_ways_of_harmful_ones() -> None:
    counts = Counter(tuple(words(text)[:2]) for text in TEXTS["benign"])
    assert len(counts) >= 250
    assert max(counts.values()) <= 0.2 * len(BENIGN)
    assert {wording for text in TEXTS["benign"] for wording in wordings(text)} >= set(WORDINGS) - {"how_to"}


@pytest.mark.parametrize("name", NAMES)
def test_unique(name: str) -> None:
    repeated = [key for key, n in Counter(map(normalized, TEXTS[name])).items() if n > 1]
    assert not repeated


@pytest.mark.parametrize(("a", "b"), PAIRS_OF_SETS)
def test_disjoint(a: str, b: str) -> None:
    assert not set(map(normalized, TEXTS[a])) & set(map(normalized, TEXTS[b]))


@pytest.mark.parametrize("probes", ["probes_harmful", "probes_benign"])
@pytest.mark.parametrize("other", USED_IN_FITTING)
def test_probes_are_held_out(probes: str, other: str) -> None:
    def bags(text: str) -> tuple[set[str], set[str]]:
        return set(words(text)), set(normalized(text).split())

    others = [(text, *bags(text)) for text in TEXTS[other]]
    close = [
        (probe, text)
        for probe, probe_full, probe_stripped in ((probe, *bags(probe)) for probe in TEXTS[probes])
        for text, full, stripped in others
        if max(jaccard(probe_full, full), jaccard(probe_stripped, stripped)) >= 0.75
    ]
    assert not close


@pytest.mark.parametrize(
    ("probes", "other", "length"),
    [
        *(("probes_harmful", other, 4) for other in USED_IN_FITTING),
        ("probes_benign", "anchors_harmful", 4),
        *(("probes_benign", other, 6) for other in USED_IN_FITTING[1:]),
    ],
)
def test_probes_share_no_run_of_words_with_what_fits_a_guard(probes: str, other: str, length: int) -> None:
    """Four words where either side is harmful; six where both are benign, for everyday questions are phrased alike."""
    seen = {run: text for text in TEXTS[other] for run in runs(text, length)}
    shared = [(probe, seen[run]) for probe in TEXTS[probes] for run in runs(probe, length) if run in seen]
    assert not shared


def test_length_does_not_tell_harmful_probes_from_benign_ones() -> None:
    assert auc(*by_harm(len(words(row["text"])) for row in PROBES)) == pytest.approx(0.5, abs=0.08)


def test_the_first_two_words_hardly_tell_harmful_probes_from_benign_ones() -> None:
    assert auc(*by_harm(opening_scores(PROBES))) <= 0.65
