"""The detector: its direction, its thresholds, its stand-in for the constant 1, and how examples are dealt out."""

from __future__ import annotations

import math

import pytest
import torch
from gates import readings, unit_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting.linear_probe import (
    ALWAYS,
    FOLDS,
    L2S,
    Detector,
    LinearProbe,
    firing,
    fit_constant,
    fit_probe,
    least_used,
    opening,
    prompt_threshold,
    split,
)
from guardfold.guard.fitting.transcripts import Place

WIDTH = 24
PLANTED = unit_vector(WIDTH, 1)


def noise(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def planted(positives: int = 800, negatives: int = 4000) -> tuple[Tensor, Tensor]:
    return noise(positives, 2) + 3 * PLANTED, noise(negatives, 3)


def probe_of(positives: Tensor, negatives: Tensor, unit: Tensor | None = None) -> LinearProbe:
    """A probe with both classes of equal weight, and every fifth row in a fold."""
    x = torch.cat([positives, negatives])
    harmful = torch.arange(len(x)) < len(positives)
    weight = torch.where(harmful, 0.5 / max(1, len(positives)), 0.5 / max(1, len(negatives)))
    return fit_probe(x, harmful, weight, torch.arange(len(x)) % FOLDS, unit)


def test_rows_are_scored_by_a_fit_that_has_not_seen_their_fold() -> None:
    """Where one fold is labelled the other way round, its scores follow the others' labels and not its own."""
    positives, negatives = planted(400, 400)
    x, folds = torch.cat([positives, negatives]), torch.arange(800) % FOLDS
    is_positive = torch.arange(800) < 400
    odd = folds == 0
    probe = fit_probe(x, is_positive ^ odd, torch.full((800,), 1 / 800), folds)
    assert float(((probe.held_out > 0) == is_positive)[odd].double().mean()) > 0.9


def test_the_planted_direction_is_found() -> None:
    probe = probe_of(*planted())
    assert cosine(probe.weights, PLANTED) > 0.97
    assert probe.l2 in L2S


def test_the_direction_that_separates_is_found_where_another_varies_more_whatever_the_scale() -> None:
    loud = torch.ones(WIDTH)
    loud[0] = 20
    positives, negatives = planted()
    plain, shifted = probe_of(positives, negatives), probe_of(positives * loud + 4, negatives * loud + 4)
    scores = [probe.held_out for probe in (plain, shifted, probe_of(positives * 0.001, negatives * 0.001))]
    assert torch.allclose(scores[0], scores[1], atol=0.02) and torch.allclose(scores[0], scores[2], atol=0.02)


def test_groups_weigh_what_is_said_whatever_their_number() -> None:
    positives, negatives = noise(300, 4) + 1.5 * PLANTED, noise(300, 5)
    assert cosine(probe_of(positives, negatives).weights, probe_of(positives, negatives.repeat(20, 1)).weights) > 0.999


def test_scores_of_a_fold_are_by_a_fit_that_has_not_seen_it() -> None:
    """Rows of noise that a fit can learn by heart, but not foretell."""
    x, harmful = noise(60, 6).repeat(1, 8) + 0.1 * torch.randn(60, 8 * WIDTH), torch.arange(60) % 2 == 0
    folds = torch.arange(60) % FOLDS
    probe = fit_probe(x, harmful, torch.full((60,), 1 / 60), folds)
    seen = probe.score(x)
    assert float(seen[harmful].mean() - seen[~harmful].mean()) > 0.5
    changed = x.clone()
    changed[folds == 2] += 100 * noise(int((folds == 2).sum()), 7).repeat(1, 8)
    far = fit_probe(
        torch.cat([x, x[:1]]),
        torch.cat([harmful, harmful[:1]]),
        torch.full((61,), 1 / 61),
        torch.cat([folds, torch.tensor([ALWAYS])]),
    )
    assert torch.allclose(far.held_out[-1], far.score(x[:1])[0], atol=1e-3)
    lucky = float(probe.held_out[harmful].mean() - probe.held_out[~harmful].mean())
    assert lucky < 0.5 * float(seen[harmful].mean() - seen[~harmful].mean())


def test_classes_that_a_plane_separates_are_no_trouble() -> None:
    probe = probe_of(noise(20, 6) * 0.01 + PLANTED, noise(20, 7) * 0.01 - PLANTED)
    assert torch.isfinite(probe.weights).all()
    assert float(probe.score(PLANTED[None])) > 0 > float(probe.score(-PLANTED[None]))


@pytest.mark.parametrize(("positives", "negatives"), [(0, 5), (5, 0)])
def test_a_detector_without_examples_of_both_kinds_is_refused(positives: int, negatives: int) -> None:
    with pytest.raises(InputError, match="both harmful and harmless"):
        probe_of(noise(positives, 1), noise(negatives, 2))


@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    rate=st.sampled_from([0.0, 0.005, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_no_group_exceeds_its_rate_and_a_lower_threshold_would(counts: list[int], rate: float, seed: int) -> None:
    scores = torch.randn(sum(counts), generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(counts).cumsum(0)
    rows = {str(n): (torch.arange(len(scores)) < end, rate) for n, end in enumerate(ends.tolist())}
    t0 = prompt_threshold(scores, rows)
    assert all(float((scores[each] > t0).double().mean()) <= rate for each, _ in rows.values())
    assert any(float((scores[each] >= t0).double().mean()) > rate for each, _ in rows.values())


def test_prompts_to_which_it_makes_no_difference_count_among_all_but_never_against() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    every = torch.ones(10, dtype=torch.bool)
    assert prompt_threshold(scores, {"all": (every, 0.1)}) == 4.0
    assert prompt_threshold(scores.masked_fill(scores == 5, -math.inf), {"all": (every, 0.1)}) == 3.0


def test_a_ramp_is_a_tenth_of_the_way_to_the_median_of_harmful_prompts() -> None:
    probe = LinearProbe(torch.tensor([3.0, 4.0]), 1.0, None, 0.1, torch.zeros(0))
    detector = probe.detector(2.0, torch.tensor([4.0, 12.0, 22.0]))
    assert torch.allclose(detector.u, torch.tensor([0.6, 0.8]))
    x = torch.tensor([[0.2, 0.1], [1.0, 0.25], [3.0, 4.0]])  # scores 2, 5, 26: nothing, all, all
    assert (detector.t0, detector.t1) == (pytest.approx(0.2), pytest.approx(0.4))
    assert opening(detector, x).tolist() == pytest.approx([0, 1, 1], abs=1e-5)
    assert probe.detector(50.0, torch.tensor([4.0])).t1 > probe.detector(50.0, torch.tensor([4.0])).t0


ENDS = 2 * unit_vector(WIDTH, 30)
"""What last tokens have in common: the words with which every prompt ends."""


def ending(rows: int, seed: int) -> Tensor:
    return ENDS + 0.2 * noise(rows, seed)


def test_what_stands_in_for_one_is_one_on_last_tokens() -> None:
    k = fit_constant(ending(2000, 40))
    unseen = ending(500, 41) @ k
    assert float(unseen.mean()) == pytest.approx(1, abs=0.01) and float(unseen.std()) < 0.15


def test_a_bias_free_detector_opens_where_one_with_a_bias_does() -> None:
    positives, negatives = ending(400, 42) + 0.8 * PLANTED, ending(2000, 43)
    k = fit_constant(torch.cat([positives, negatives]))
    detectors = []
    for unit in (None, k):
        probe = probe_of(positives, negatives, unit)
        rows = torch.arange(2400) >= 400
        detectors.append(probe.detector(prompt_threshold(probe.held_out, {"no": (rows, 0.01)}), probe.held_out[:400]))
    new, other = ending(400, 44) + 0.8 * PLANTED, ending(4000, 45)
    opens = [[float((opening(each, x) > 0.01).double().mean()) for x in (new, other)] for each in detectors]
    assert opens[1][0] == pytest.approx(opens[0][0], abs=0.05) and opens[0][0] > 0.6
    assert max(each[1] for each in opens) < 0.03


def test_positions_that_every_fit_sees_stay_shut_without_biases() -> None:
    elsewhere = 2 * unit_vector(WIDTH, 31) + 0.2 * noise(4000, 46) + PLANTED
    positives, negatives = ending(400, 42) + 0.8 * PLANTED, ending(2000, 43)
    x = torch.cat([positives, negatives, elsewhere])
    harmful = torch.arange(len(x)) < 400
    weight = torch.cat(
        [torch.full((400,), 0.35 / 400), torch.full((2000,), 0.35 / 2000), torch.full((4000,), 0.3 / 4000)]
    )
    folds = torch.cat([torch.arange(2400) % FOLDS, torch.full((4000,), ALWAYS)])
    k = fit_constant(x[:2400], readings({Place.TEXT: elsewhere}))
    assert float((elsewhere @ k).abs().mean()) < 0.2 and abs(float((positives @ k).mean()) - 1) < 0.1
    probe = fit_probe(x, harmful, weight, folds, k)
    detector = probe.detector(prompt_threshold(probe.held_out, {"no": (~harmful, 0.01)}), probe.held_out[harmful])
    assert firing(detector, readings({Place.TEXT: elsewhere}))["text"] < 0.02
    assert float((opening(detector, positives) > 0.5).double().mean()) > 0.5


def test_opening_is_the_ideal_ramp() -> None:
    detector = Detector(torch.tensor([1.0, 0.0]), 1.0, 3.0)
    x = torch.tensor([[0.0, 9.0], [1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [30.0, 9.0]])
    assert opening(detector, x).tolist() == [0, 0, 0.5, 1, 1]
    free = Detector(detector.u, 1.0, 3.0, torch.tensor([0.0, 1.0]))
    assert opening(free, torch.tensor([[2.0, 1.0], [4.0, 2.0], [30.0, 2.0]])).tolist() == [0.5, 2 * 1.0, 2 * 2.0]


def test_firing_says_at_which_places_a_gate_opens_at_all() -> None:
    detector = Detector(PLANTED, 1.0, 2.0)
    groups = {Place.TEXT: torch.zeros(8, WIDTH), Place.ANSWER: torch.stack([0 * PLANTED] * 3 + [5 * PLANTED])}
    assert firing(detector, readings(groups)) == {"text": 0.0, "answer": 0.25}


def test_the_least_used_neurons_are_those_that_write_least() -> None:
    importance = torch.tensor([3.0, 0.1, 5.0, 0.0, 0.05])
    assert least_used(importance, 2) == (3, 4)
    assert least_used(importance, 3) == (1, 3, 4)


@given(count=st.integers(4, 600), shares=st.sampled_from([(0.4, 0.2, 0.2, 0.2), (0.5, 0.5), (0.1, 0.2, 0.7), (1.0,)]))
@settings(max_examples=50, deadline=None)
def test_a_split_is_disjoint_exhaustive_repeatable_and_keeps_its_shares(count: int, shares: tuple[float, ...]) -> None:
    parts = split(count, shares)
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert split(count, shares) == parts
    assert all(abs(len(part) - share * count) <= 1 for part, share in zip(parts, shares, strict=True))
    assert all(part == sorted(part) for part in parts)


def test_a_split_is_not_the_order_of_the_file() -> None:
    assert split(100, (0.5, 0.5))[0] != list(range(50))
