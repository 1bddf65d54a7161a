"""The statistics of a verdict, against their definitions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import comb, log, sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardfold.validators.behaviour.statistics import (
    Pairs,
    Rate,
    at_most,
    binomial_tail,
    holm,
    mcnemar,
    needed,
    upper_bound,
)

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


def tables(total: int) -> list[Pairs]:
    """Every way in which `total` pairs can fall."""
    return [
        Pairs(both, lost, won, total)
        for both, lost, won in product(range(total + 1), repeat=3)
        if both + lost + won <= total
    ]


def chance(pairs: Pairs, both: float, lost: float, won: float) -> float:
    """The multinomial probability of `pairs`, given the rates."""
    neither = pairs.total - pairs.both - pairs.lost - pairs.won
    ways = comb(pairs.total, pairs.both) * comb(pairs.total - pairs.both, pairs.lost)
    ways *= comb(pairs.total - pairs.both - pairs.lost, pairs.won)
    rest = max(0.0, 1 - both - lost - won)
    return float(ways * both**pairs.both * lost**pairs.lost * won**pairs.won * rest**neither)


def likeliest(pairs: Pairs, rates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Which of `rates` (both, lost, won) gives `pairs` the highest probability."""

    def likelihood(at: tuple[float, float, float]) -> float:
        counts = (pairs.both, pairs.lost, pairs.won, pairs.total - pairs.both - pairs.lost - pairs.won)
        parts = zip(counts, (*at, 1 - sum(at)), strict=True)
        return sum(count * log(max(rate, 1e-300)) for count, rate in parts if count)

    return max(rates, key=likelihood)


FINE = 400


@pytest.mark.parametrize("pairs", [Pairs(8, 6, 2, 30), Pairs(3, 12, 1, 40), Pairs(0, 5, 0, 12), Pairs(10, 0, 4, 25)])
def test_the_paired_interval_holds_the_differences_that_a_score_test_does_not_reject(pairs: Pairs) -> None:
    """The nuisance, the rate of lost ones, is found by trying: the likelihood does not depend on more."""
    for bound in pairs.interval():
        tried = [(step / FINE) * (1 - abs(bound)) / 2 + max(0.0, -bound) for step in range(FINE + 1)]
        alike = Pairs(0, pairs.lost, pairs.won, pairs.total)
        _, lost, won = likeliest(alike, [(0.0, rate, rate + bound) for rate in tried])
        deviation = sqrt((lost + won - bound**2) / pairs.total)
        assert abs(pairs.difference - bound) / deviation == pytest.approx(1.959964, rel=0.01)
    assert pairs.interval()[0] < pairs.difference < pairs.interval()[1]


def test_the_paired_interval_depends_on_the_pairs_that_changed_alone() -> None:
    low, high = Pairs(50, 20, 40, 160).interval()
    assert (round(low, 4), round(high, 4)) == (0.0309, 0.2181)
    assert Pairs(9, 20, 40, 160).interval() == pytest.approx((low, high))
    assert Pairs(0, 0, 0, 0).interval() == (-1, 1)


@pytest.mark.parametrize("pairs", [Pairs(8, 20, 2, 60), Pairs(3, 25, 1, 60), Pairs(0, 9, 0, 20), Pairs(5, 30, 4, 80)])
def test_at_the_bound_of_the_cut_a_score_test_is_just_at_its_level(pairs: Pairs) -> None:
    ratio = 1 - pairs.cut()
    rates = []
    for before, share in product([step / FINE for step in range(1, FINE)], [step / FINE for step in range(FINE + 1)]):
        won = share * ratio * before
        both = ratio * before - won
        if before + won < 1:
            rates.append((both, before - both, won))
    both, lost, won = likeliest(pairs, rates)
    deviation = sqrt(pairs.total * (both * (1 - ratio) ** 2 + won + lost * ratio**2))
    excess = pairs.both + pairs.won - ratio * (pairs.both + pairs.lost)
    assert excess / deviation == pytest.approx(-1.6449, rel=0.02)


def test_too_large_a_cut_is_claimed_about_as_rarely_as_it_says() -> None:
    """All tables of 20 pairs, over rates at which compliance is cut by exactly half."""
    claimed = [pairs for pairs in tables(20) if pairs.cut() >= 0.5]
    worst = 0.0
    for before, new in product((0.1, 0.3, 0.5, 0.7, 0.9), (0.0, 0.2, 0.5)):
        won = new * before / 2
        rates = before / 2 - won, before / 2 + won, won
        if sum(rates) <= 1:
            worst = max(worst, sum(chance(pairs, *rates) for pairs in claimed))
    assert 0.03 < worst < 0.06


def test_the_cut_is_none_where_nothing_fell_and_grows_with_what_did() -> None:
    assert Pairs(5, 0, 0, 20).cut() == Pairs(5, 2, 3, 20).cut() == Pairs(0, 0, 0, 20).cut() == 0
    cuts = [Pairs(100 - gone, gone, 0, 300).cut() for gone in range(0, 101, 10)]
    assert cuts == sorted(cuts)
    assert cuts[-1] > 0.95
    assert Pairs(10, 90, 0, 300).cut(0.01) < Pairs(10, 90, 0, 300).cut(0.05) < 0.9


def test_pairs_are_counted_prompt_by_prompt() -> None:
    assert Pairs.of([True, True, False, False], [True, False, True, False]) == Pairs(1, 1, 1, 4)
    with pytest.raises(ValueError, match="shorter"):
        Pairs.of([True], [])


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 0.99))
def test_both_tails_of_a_binomial_make_one(count: int, total: int, p: float) -> None:
    assert at_most(count - 1, total, p) + binomial_tail(count, total, p) == pytest.approx(1)


@pytest.mark.parametrize(("limit", "lost", "count"), [(0.02, 0.0, 149), (0.05, 0.0, 59), (0.02, 0.0025, 313)])
def test_as_many_are_needed_as_the_bound_takes(limit: float, lost: float, count: int) -> None:
    assert needed(limit, lost) == count

    def passes(total: int) -> float:
        allowed = [seen for seen in range(min(total, 5)) if upper_bound(seen, total) <= limit]
        return at_most(max(allowed), total, lost) if allowed else 0.0

    assert passes(count) >= 0.95
    assert max(passes(total) for total in range(1, count)) < 0.95


def test_holm_rejects_as_rarely_as_it_says_and_more_than_bonferroni() -> None:
    assert holm([0.04, 0.01], 0.05) == [True, True]
    assert holm([0.04, 0.03], 0.05) == [False, False]
    assert holm([0.3, 0.001, 0.02, 0.012], 0.05) == [False, True, True, True]
    assert holm([], 0.05) == []
    draw = Random(0)
    false = sum(any(holm([draw.random() for _ in range(20)], 0.05)) for _ in range(2000))
    assert 0.03 < false / 2000 < 0.07
