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
    Detector,
    firing,
    fit_direction,
    fit_unit,
    least_used,
    opening,
    split,
    thresholds,
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


def test_the_planted_direction_is_found() -> None:
    positives, negatives = planted()
    u = fit_direction(positives, negatives)
    assert float(u.norm()) == pytest.approx(1, abs=1e-5)
    assert cosine(u, PLANTED) > 0.97


def test_the_direction_that_separates_is_found_where_another_varies_more_whatever_the_scale() -> None:
    loud = torch.ones(WIDTH)
    loud[0] = 20
    positives, negatives = planted()
    shift = torch.zeros(WIDTH)
    shift[1] = 4
    u = fit_direction((positives - 3 * PLANTED) * loud + shift, negatives * loud)
    assert abs(float(u[1])) > 0.95
    for scale in (0.001, 100.0):
        scaled = fit_direction(scale * ((positives - 3 * PLANTED) * loud + shift), scale * negatives * loud)
        assert cosine(scaled, u) > 0.999


def test_classes_weigh_the_same_whatever_their_number() -> None:
    """Classes of unlike spread: the boundary would turn with the balance."""
    spread = torch.ones(WIDTH)
    spread[:4] = 5
    positives, negatives = noise(300, 4) * spread + 1.5 * PLANTED, noise(300, 5)
    u = fit_direction(positives, negatives)
    assert cosine(fit_direction(positives, negatives.repeat(20, 1)), u) > 0.9999
    assert cosine(fit_direction(positives.repeat(20, 1), negatives), u) > 0.9999


def test_classes_that_a_plane_separates_are_no_trouble() -> None:
    u = fit_direction(noise(20, 6) * 0.01 + PLANTED, noise(20, 7) * 0.01 - PLANTED)
    assert cosine(u, PLANTED) > 0.99


@pytest.mark.parametrize(("positives", "negatives"), [(0, 5), (5, 0)])
def test_a_detector_without_examples_of_both_kinds_is_refused(positives: int, negatives: int) -> None:
    with pytest.raises(InputError, match="both harmful and harmless"):
        fit_direction(noise(positives, 1), noise(negatives, 2))


@given(count=st.integers(2000, 40_000), rate=st.sampled_from([1e-3, 3e-3, 0.05, 0.5]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_t0_is_exceeded_by_the_rate_asked_for(count: int, rate: float, seed: int) -> None:
    u = torch.tensor([1.0, 0.0])
    negatives = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    t0, t1 = thresholds(u, negatives[:50] + 3, negatives, rate)
    assert abs(float((negatives @ u > t0).double().mean()) - rate) <= 2 / count
    assert t1 > t0


def test_t0_does_not_grow_with_the_number_of_negatives() -> None:
    positives, _ = planted()
    few, many = (thresholds(PLANTED, positives, noise(count, 8), 0.01)[0] for count in (4000, 100_000))
    assert few == pytest.approx(many, abs=0.2)
    assert few == pytest.approx(2.33, abs=0.2)
    assert noise(100_000, 8).matmul(PLANTED).max() > many + 1


def test_t1_is_the_30_percent_quantile_of_the_positives_where_they_lie_far_enough() -> None:
    positives = noise(5000, 9) + 8 * PLANTED
    _, t1 = thresholds(PLANTED, positives, noise(5000, 10), 0.01)
    assert float((positives @ PLANTED < t1).double().mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("shift", [3.0, 0.0, -3.0])
def test_t1_lies_above_t0_however_badly_classes_separate(shift: float) -> None:
    positives, negatives = noise(500, 11) + shift * PLANTED, noise(500, 12)
    t0, t1 = thresholds(PLANTED, positives, negatives, 0.001)
    distance = float((positives.mean(0) - negatives.mean(0)) @ PLANTED)
    assert t1 - t0 >= max(0.1 * distance, 1e-3) * 0.999
    assert math.isfinite(t0) and math.isfinite(t1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_thresholds_of_very_few_negatives_are_among_them(count: int) -> None:
    negatives = noise(count, 13)
    t0, _ = thresholds(PLANTED, noise(5, 14), negatives, 0.5)
    assert float((negatives @ PLANTED - t0).abs().min()) == 0


def places() -> dict[Place, Tensor]:
    """Readings after a norm: clusters of unlike size per place, each with its own mean."""
    sizes = {Place.TEXT: 1500, Place.IMAGE: 4000, Place.LAST: 150, Place.ANSWER: 800}
    return {place: 0.2 * noise(size, 20 + place) + 2 * unit_vector(WIDTH, 30 + place) for place, size in sizes.items()}


def fitted(groups: dict[Place, Tensor]) -> tuple[Detector, Tensor]:
    positives = 0.2 * noise(400, 40) + 2 * unit_vector(WIDTH, 30 + Place.LAST) + 2.5 * PLANTED
    negatives = readings(groups)
    u = fit_direction(positives, negatives.x)
    t0, t1 = thresholds(u, positives, negatives.x, 1e-3)
    return Detector(u, t0, t1, fit_unit(u, t0, t1, positives, negatives)), positives


def test_the_bias_free_gate_opens_on_positives_and_stays_shut_elsewhere() -> None:
    groups = places()
    detector, positives = fitted(groups)
    assert detector.unit is not None
    assert float((positives @ detector.unit).mean()) == pytest.approx(1, abs=0.2)
    assert float(opening(detector, positives).mean()) > 0.7
    assert max(firing(detector, readings(groups)).values()) < 0.02
    unseen = {place: x + 0.02 * noise(len(x), 50) for place, x in groups.items()}
    assert max(firing(detector, readings(unseen)).values()) < 0.02


def test_every_place_weighs_the_same_in_the_unit_however_rare_it_is() -> None:
    groups = places()
    detector, _ = fitted(groups)
    u, t0, t1 = detector.u, detector.t0, detector.t1
    positives = 0.2 * noise(400, 40) + 2 * unit_vector(WIDTH, 30 + Place.LAST) + 2.5 * PLANTED
    again = fit_unit(u, t0, t1, positives, readings({**groups, Place.IMAGE: groups[Place.IMAGE].repeat(5, 1)}))
    assert detector.unit is not None
    assert cosine(again, detector.unit) > 0.999


def test_a_unit_needs_no_reading_of_every_place() -> None:
    groups = places()
    only, _ = fitted({Place.LAST: groups[Place.LAST], Place.ANSWER: groups[Place.ANSWER]})
    assert only.unit is not None and bool(torch.isfinite(only.unit).all())


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
