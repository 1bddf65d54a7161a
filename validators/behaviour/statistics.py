"""The few statistics a verdict needs: intervals for rates, bounds for rare events, paired decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import exp, lgamma, log, log1p, sqrt
from typing import Any

Z95 = 1.959964
"""Two-sided 95 % point of the normal distribution."""


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
        """The rate of True in `outcomes`; [0, 1] where there are none."""
        count, total = sum(outcomes), len(outcomes)
        if total == 0:
            return cls(0, 0, 0.0, 0.0, 1.0)
        p, z2 = count / total, Z95**2
        centre = (p + z2 / (2 * total)) / (1 + z2 / total)
        half = Z95 / (1 + z2 / total) * sqrt(p * (1 - p) / total + z2 / (4 * total**2))
        return cls(count, total, p, max(0.0, centre - half), min(1.0, centre + half))

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def binomial_tail(count: int, total: int, p: float) -> float:
    """P(X >= count) for X ~ Binomial(total, p)."""
    if p in (0, 1):
        return float(count <= (total if p else 0))
    terms = (
        lgamma(total + 1) - lgamma(k + 1) - lgamma(total - k + 1) + k * log(p) + (total - k) * log1p(-p)
        for k in range(max(count, 0), total + 1)
    )
    return min(1.0, sum(map(exp, terms)))


def upper_bound(count: int, total: int, error: float = 0.05) -> float:
    """The rate above which so few as `count` of `total` are less likely than `error` (Clopper-Pearson, one-sided)."""
    if count >= total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - binomial_tail(count + 1, total, middle) > error:
            low = middle
        else:
            high = middle
    return high


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """One-sided exact p-value that True became rarer from `before` to `after`, paired (McNemar 1947).

    Small: rarer.  Near 1: more frequent.  1.0 where no pair changed.
    """
    rarer = sum(b and not a for b, a in zip(before, after, strict=True))
    oftener = sum(a and not b for b, a in zip(before, after, strict=True))
    return binomial_tail(rarer, rarer + oftener, 0.5)
