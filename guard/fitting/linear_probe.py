"""The gate's detector: which MLP inputs mean "a harmful request ends here", and from what score on.

positives: x of the last prompt token of harmful anchors, with and without images.  negatives: x of the last prompt
token of harmless ones, and of every other position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import InputError
from .transcripts import Place, Readings

L2 = 1e-3
STEPS = 200
UNIT_MARGIN = 0.5
"""How far below its thresholds a bias-free gate is pushed where it must stay shut, in units of t1 - t0."""


@dataclass(frozen=True)
class Detector:
    """u, [d], unit length; scores are u.x.  t0: where the gate begins to open.  t1: where it is open.

    unit: k, [d], for MLPs without biases, else None.
    """

    u: Tensor
    t0: float
    t1: float
    unit: Tensor | None = None


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """argmin of a convex `loss` from `start`, by L-BFGS."""
    point = start.clone().requires_grad_()
    solver = torch.optim.LBFGS([point], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(point)
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(closure)
    return point.detach()


def fit_direction(positives: Tensor, negatives: Tensor) -> Tensor:
    """u, [d], of unit length: class-balanced logistic regression with an L2 penalty, its intercept dropped.

    positives: [p, d].  negatives: [n, d].  Raises InputError if either is empty.
    """
    if not len(positives) or not len(negatives):
        raise InputError("a detector needs both harmful and harmless examples")
    scale = negatives.square().mean().sqrt()
    yes, no = positives / scale, negatives / scale

    def loss(w: Tensor) -> Tensor:
        data = F.softplus(-(yes @ w[:-1] + w[-1])).mean() + F.softplus(no @ w[:-1] + w[-1]).mean()
        return data / 2 + L2 / 2 * w[:-1].square().sum()

    u = _minimise(loss, torch.zeros(positives.shape[1] + 1))[:-1]
    return u / u.norm()


def thresholds(u: Tensor, positives: Tensor, negatives: Tensor, rate: float) -> tuple[float, float]:
    """Returns (t0, t1) on examples that u was not fitted to.

    t0: the score that a share `rate` of the negatives exceed, whatever their number (the maximum would grow with it).
    t1: the 30 % quantile of the positives, or t0 + a tenth of the distance of the means if that is more.
    """
    yes, no = positives @ u, (negatives @ u).sort().values
    t0 = float(no[max(0, min(len(no) - 1, int((1 - rate) * len(no))))])
    least = 0.1 * float(yes.mean() - no.mean())
    return t0, max(float(yes.quantile(0.3)), t0 + max(least, 1e-3))


def fit_readout(positives: Tensor, other: Readings, weight: float) -> Tensor:
    """g, [neurons]: ridge regression of g.a on 1 at `positives` and on 0 everywhere else, float32.

    Minimises mean (g.a - 1)^2 over positives + `weight` * sum over the kinds of places of mean (g.a)^2 + L2 |g|^2, in
    units of the mean square of a neuron.  positives: [p, neurons].  Raises InputError if either is empty.
    """
    if not len(positives) or not len(other.x):
        raise InputError("nothing to fit a linear gate on: it needs harmful and harmless prompts")
    groups = [other.x[other.places == place].double() for place in other.places.unique()]
    opened = positives.double()
    moments = opened.T @ opened / len(opened) + weight * torch.stack([x.T @ x / len(x) for x in groups]).sum(0)
    ridge = L2 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.solve(moments + ridge, opened.mean(0)).float()


def fit_unit(u: Tensor, t0: float, t1: float, positives: Tensor, negatives: Readings) -> Tensor:
    """k, [d], that stands in for the constant 1 where an MLP has no biases.

    k.x = 1 in least squares where the gate must open; elsewhere only t k.x >= u.x + margin for both thresholds, so
    that both neurons stay shut, and k.x >= 0.  Places weigh the same whatever their number.
    """
    margin = UNIT_MARGIN * (t1 - t0)
    groups = [negatives.at(place) for place in Place]
    groups = [x for x in groups if len(x)]
    scores = [x @ u for x in groups]

    def loss(k: Tensor) -> Tensor:
        total = (positives @ k - 1).square().mean() + L2 * k.square().sum()
        for x, score in zip(groups, scores, strict=True):
            one = x @ k
            shut = [F.relu(score + margin - t * one).square() for t in (t0, t1)]
            total = total + (shut[0] + shut[1]).mean() / (t1 - t0) ** 2 + F.relu(-one).square().mean()
        return total

    start = positives.mean(0)
    return _minimise(loss, start / start.square().sum())


def least_used(importance: Tensor, count: int) -> tuple[int, ...]:
    """Returns the `count` neurons that write least, in ascending order of their number. importance: [neurons]."""
    return tuple(sorted(importance.argsort()[:count].tolist()))


def opening(detector: Detector, x: Tensor) -> Tensor:
    """Returns how far the ideal gate opens at x [n, d]: [n], 0 to 1 (beta = inf; with k.x in place of 1 for bias-free
    ones).
    """
    one = torch.ones(len(x)) if detector.unit is None else x @ detector.unit
    score = x @ detector.u
    below, above = (F.relu(score - t * one) for t in (detector.t0, detector.t1))
    return (below - above) / (detector.t1 - detector.t0) * one


def firing(detector: Detector, readings: Readings) -> dict[str, float]:
    """Returns place -> share of its positions at which the gate opens at all (more than 1 %)."""
    return {
        place.name.lower(): float((opening(detector, x).abs() > 0.01).double().mean())
        for place in Place
        if len(x := readings.at(place))
    }


def split(count: int, shares: Sequence[float]) -> list[list[int]]:
    """Returns indices 0 .. count-1 dealt out in these shares, at random but always the same way."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    bounds = [round(sum(shares[:i]) * count) for i in range(len(shares) + 1)]
    return [sorted(order[first:last]) for first, last in pairwise(bounds)]
