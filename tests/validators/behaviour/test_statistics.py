"""The statistics of a verdict, against their definitions."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardfold.validators.behaviour.statistics import Rate, binomial_tail, mcnemar, upper_bound

outcomes = st.lists(st.booleans(), min_size=1, max_size=400)


@given(outcomes)
def test_the_wilson_interval_holds_the_rates_that_a_score_test_does_not_reject(seen: list[bool]) -> None:
    rate, n = Rate.of(seen), len(seen)
    assert (rate.count, rate.total, rate.rate) == (sum(seen), n, sum(seen) / n)
    assert 0 <= rate.low <= rate.rate + 1e-12
    assert rate.rate - 1e-12 <= rate.high <= 1
    for bound in (rate.low, rate.high):
        if 1e-9 < bound < 1 - 1e-9:  # the two rates at which the score statistic is just at its 95 % point
            assert abs(rate.rate - bound) / sqrt(bound * (1 - bound) / n) == pytest.approx(1.959964, rel=1e-4)


def test_wilson_at_its_ends_and_without_any_outcome() -> None:
    none, everything, nothing = Rate.of([False] * 10), Rate.of([True] * 10), Rate.of([])
    assert none.low == pytest.approx(0, abs=1e-12)
    assert none.high == pytest.approx(1.959964**2 / (10 + 1.959964**2))
    assert everything.high == pytest.approx(1)
    assert everything.low == pytest.approx(1 - none.high)
    assert (nothing.low, nothing.high, nothing.total) == (0, 1, 0)


def exact_tail(count: int, total: int, p: Fraction) -> Fraction:
    return sum((comb(total, k) * p**k * (1 - p) ** (total - k) for k in range(count, total + 1)), Fraction(0))


@given(st.integers(0, 60), st.integers(0, 60), st.fractions(0, 1, max_denominator=97))
def test_the_binomial_tail_is_the_exact_sum(count: int, total: int, p: Fraction) -> None:
    assert binomial_tail(count, total, float(p)) == pytest.approx(float(exact_tail(count, total, p)), abs=1e-12)


@given(total=st.integers(1, 300), share=st.floats(0, 1), error=st.sampled_from([0.01, 0.05, 0.2]))
@settings(max_examples=50, deadline=None)
def test_at_the_upper_bound_so_few_are_just_as_likely_as_the_error(total: int, share: float, error: float) -> None:
    count = round(share * total)
    bound = upper_bound(count, total, error)
    if count == total:
        assert bound == 1
    else:
        at_most = 1 - exact_tail(count + 1, total, Fraction(bound))
        assert float(at_most) == pytest.approx(error, rel=1e-6)
        assert bound > count / total


@given(total=st.integers(2, 200))
@settings(max_examples=30, deadline=None)
def test_the_upper_bound_grows_with_what_was_seen_and_shrinks_with_more_data(total: int) -> None:
    bounds = [upper_bound(count, total) for count in range(0, total + 1, max(1, total // 10))]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == len(bounds)
    assert upper_bound(0, total + 1) < upper_bound(0, total)
    assert upper_bound(1, total, 0.01) > upper_bound(1, total, 0.05)


@pytest.mark.parametrize(("losses", "enough"), [(0, 149), (1, 236)])
def test_two_percent_take_as_many_probes_as_the_design_says(losses: int, enough: int) -> None:
    assert upper_bound(losses, enough) <= 0.02 < upper_bound(losses, enough - 1)


def enumerated(rarer: int, oftener: int) -> float:
    """P(at least `rarer` heads) by tossing every coin both ways."""
    tosses = list(product((0, 1), repeat=rarer + oftener))
    return sum(sum(toss) >= rarer for toss in tosses) / len(tosses)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30))
def test_mcnemar_is_a_fair_coin_for_each_pair_that_changed(pairs: list[tuple[bool, bool]]) -> None:
    changed = [pair for pair in pairs if pair[0] != pair[1]][:12]
    kept = [pair for pair in pairs if pair[0] == pair[1]]
    rarer = sum(before for before, _ in changed)
    expected = enumerated(rarer, len(changed) - rarer)
    before, after = ([pair[side] for pair in changed + kept] for side in (0, 1))
    assert mcnemar(before, after) == pytest.approx(expected)


def test_mcnemar_is_one_sided_and_paired() -> None:
    assert mcnemar([True] * 10, [False] * 10) == pytest.approx(2**-10)
    assert mcnemar([False] * 10, [True] * 10) == pytest.approx(1)
    assert mcnemar([True, False], [True, False]) == pytest.approx(1)
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, True], [True])


def test_thousands_of_probes_are_no_obstacle() -> None:
    assert 0.001 < upper_bound(3, 2000) < 0.005
    assert upper_bound(40, 5000) == pytest.approx(0.0104, abs=5e-4)
    half = [True, False] * 1000
    assert mcnemar(half, half[::-1]) == pytest.approx(0.5, abs=0.02)
    assert mcnemar([True] * 1200 + [False] * 800, [False] * 1200 + [True] * 800) < 1e-15
