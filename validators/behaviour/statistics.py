"""The few statistics a verdict needs: intervals for rates and paired differences, bounds, paired decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count as counting
from math import exp, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Any

Z95 = 1.959964
"""Two-sided 95 % point of the normal distribution."""

HALVINGS = 50
"""Of an interval no wider than 2: beyond what float64 tells apart."""


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with its Wilson 95 % interval (Wilson 1927): rate, low and high in [0, 1]."""

    count: int
    total: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        """Returns the rate of True in `outcomes`; [0, 1] where there are none."""
        count, total = sum(outcomes), len(outcomes)
        if total == 0:
            return cls(0, 0, 0.0, 0.0, 1.0)
        p, z2 = count / total, Z95**2
        centre = (p + z2 / (2 * total)) / (1 + z2 / total)
        half = Z95 / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total**2))
        return cls(count, total, p, max(0.0, centre - half), min(1.0, centre + half))

    def figures(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Pairs:
    """Outcomes of the same prompts before and after, counted. both: True twice; lost, won: only before, only after."""

    both: int
    lost: int
    won: int
    total: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Pairs:
        """Counts `before` against `after`, prompt by prompt. ValueError if they are not of as many."""
        pairs = list(zip(before, after, strict=True))
        return cls(
            sum(b and a for b, a in pairs), sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs),
            len(pairs),
        )  # fmt: skip

    @property
    def difference(self) -> float:
        """Rate after less rate before."""
        return (self.won - self.lost) / max(1, self.total)

    def interval(self, z: float = Z95) -> tuple[float, float]:
        """Returns the score interval for `difference`, 95 % (Tango 1998): what its score test does not reject."""
        if not self.total:
            return -1.0, 1.0
        low = _crossing(lambda d: _score_of_difference(self, d) > z, -1.0, self.difference)
        high = _crossing(lambda d: _score_of_difference(self, d) > -z, self.difference, 1.0)
        return low, high

    def cut(self, error: float = 0.05) -> float:
        """Returns the lower bound, one-sided, of 1 - (rate after) / (rate before), in [0, 1]; 0 where no cut is shown.

        Of the score test of a ratio of paired rates (Nam and Blackwelder 2002), inverted.
        """
        z, before, after = NormalDist().inv_cdf(1 - error), self.both + self.lost, self.both + self.won
        if after >= before:
            return 0.0
        return 1 - _crossing(lambda ratio: _score_of_ratio(self, ratio) > -z, after / before, 1.0)

    def figures(self) -> dict[str, Any]:
        low, high = self.interval()
        return {**asdict(self), "difference": self.difference, "low": low, "high": high}


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where, between `low` and `high`, `holds` ceases to; bisection."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _score_of_difference(pairs: Pairs, difference: float) -> float:
    """Returns how many standard deviations pairs.difference lies above `difference`, in (-1, 1), by the likeliest rates
    that have it: `lost` solves 2 n x^2 + b x + c = 0.
    """
    n, d = pairs.total, difference
    b = (2 * n + pairs.lost - pairs.won) * d - pairs.lost - pairs.won
    c = -pairs.lost * d * (1 - d)
    lost = (sqrt(b * b - 8 * n * c) - b) / (4 * n)
    variance = n * (2 * lost + d * (1 - d))
    return (pairs.won - pairs.lost - n * d) / sqrt(variance) if variance > 0 else 0.0


def _score_of_ratio(pairs: Pairs, ratio: float) -> float:
    """Returns how many standard deviations the rate after lies above `ratio` times the rate before, 0 < ratio <= 1, by
    the likeliest counts that have it: `lost` solves (1 + ratio) x^2 - b x + c = 0.
    """
    touched, before, after = pairs.both + pairs.lost + pairs.won, pairs.both + pairs.lost, pairs.both + pairs.won
    b = (1 - ratio**2) * before + pairs.lost + pairs.won
    c = (1 - ratio) * pairs.lost * touched
    lost = (b + sqrt(max(0.0, b * b - 4 * (1 + ratio) * c))) / (2 * (1 + ratio))
    variance = (1 + ratio) * lost - (1 - ratio) * touched
    return (after - ratio * before) / sqrt(variance) if variance > 0 else 0.0


@lru_cache(maxsize=4096)
def binomial_tail(count: int, total: int, p: float) -> float:
    """P(X >= count) for X ~ Binomial(total, p)."""
    if p in (0, 1):
        return float(count <= (total if p else 0))
    terms = (
        lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) + k * log(p) + (total - k) * log1p(-p)
        for k in range(max(count, 0), total + 1)
    )
    return min(1.0, sum(map(exp, terms)))


def at_most(count: int, total: int, p: float) -> float:
    """P(X <= count) for X ~ Binomial(total, p)."""
    return binomial_tail(total - count, total, 1 - p)


@lru_cache(maxsize=4096)
def upper_bound(count: int, total: int, error: float = 0.05) -> float:
    """Returns the rate above which `count` or fewer of `total` are less likely than `error` (Clopper-Pearson,
    one-sided).
    """
    if count >= total:
        return 1.0
    return _crossing(lambda rate: at_most(count, total, rate) > error, count / total, 1.0)


@lru_cache(maxsize=256)
def needed(limit: float, lost: float = 0.0, error: float = 0.05, power: float = 0.95) -> int:
    """Returns the fewest prompts with which upper_bound stays within `limit` in a share `power` of all cases, if the
    true rate is `lost`, below it: of at least one outcome, then, that many say so. With lost = 0: if none is seen.
    """
    total = 1
    for allowed in counting():
        while at_most(allowed, total, limit) > error:
            total += 1
        if at_most(allowed, total, lost) >= power:
            return total
    raise AssertionError


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """One-sided exact p-value that True became rarer from `before` to `after`, paired (McNemar 1947).

    Small: rarer.  Near 1: more frequent.  1.0 where no pair changed.
    """
    pairs = Pairs.of(before, after)
    return binomial_tail(pairs.lost, pairs.lost + pairs.won, 0.5)


def holm(p_values: Sequence[float], error: float) -> list[bool]:
    """Returns which of the tests reject, if any false rejection among all of them shall be as rare as `error` (Holm
    1979).
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > error / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
