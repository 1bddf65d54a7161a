"""The gate's detector: which MLP inputs mean "a harmful request ends here", and from what score on.

A weighted logistic regression on standardised inputs, its penalty chosen and its thresholds set on the scores that each
prompt gets from a fit which has not seen its wording. Thresholds are rates of prompts, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.errors import InputError
from .transcripts import Place, Readings

L2S = (0.001, 0.003, 0.01, 0.03)
"""Penalties on the mean loss that cross-validation chooses among."""

FOLDS = 5
ALWAYS = -1
"""The fold of what every fit sees: positions that are no prompt's last."""

STEPS = 60
CONSTANT_L2 = 1e-4
CONSTANT_WEIGHT = 10.0
"""How much more k.x = 1 counts at last tokens than k.x = 0 at one kind of other positions."""

READOUT_L2 = 1e-3
OPENED = 0.01
"""How far a gate must be open to count as opened, of 1."""

RAMP = 0.1
"""How wide a gate's ramp is, of the distance from its t0 to the median of harmful prompts. Wider ones did not pay."""


@dataclass(frozen=True)
class Detector:
    """u, [d], unit length; scores are u.x.  t0: where the gate begins to open.  t1: where it is open.

    unit: k, [d], for MLPs without biases, else None.
    """

    u: Tensor
    t0: float
    t1: float
    unit: Tensor | None = None


@dataclass(frozen=True)
class LinearProbe:
    """A linear reading of harm: weights.x + bias, [n] (bias times unit.x where `unit` stands in for 1).

    weights, unit: [d].  l2: the penalty that cross-validation chose.  held_out: the score of each row that it was
    fitted to, [n], by a fit that had not seen the row's fold.
    """

    weights: Tensor
    bias: float
    unit: Tensor | None
    l2: float
    held_out: Tensor

    def score(self, x: Tensor) -> Tensor:
        """Returns the scores at x [n, d]: [n]; above 0 harm is likelier than not."""
        return x @ self.weights + self.bias * constant(x, self.unit)

    def detector(self, threshold: float, positives: Tensor) -> Detector:
        """Returns the detector that begins to open at the score `threshold`, with a ramp of RAMP of the way to the
        median score of `positives`, [p]; at least 1e-3 wide.
        """
        length = float(self.weights.norm())
        width = max(RAMP * (float(positives.median()) - threshold), 1e-3)
        t0 = (threshold - self.bias) / length
        return Detector(self.weights / length, t0, t0 + width / length, self.unit)


def constant(x: Tensor, unit: Tensor | None) -> Tensor:
    """Returns what stands for 1 at x [n, d]: [n], all ones, or k.x."""
    return torch.ones(len(x)) if unit is None else x @ unit


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


def fit_probe(x: Tensor, harmful: Tensor, weight: Tensor, folds: Tensor, unit: Tensor | None = None) -> LinearProbe:
    """Logistic regression of `harmful` on x, minimising sum(weight * loss) + l2 / 2 |w|^2 over standardised inputs.

    x: [n, d].  harmful: [n], bool.  weight: [n], sums to 1.  folds: [n]; rows of one fold are scored by a fit to the
    others, rows of ALWAYS by the fit to all.  unit: k, where k.x stands in for the intercept's 1, in fit and score
    alike.  Raises InputError unless both kinds of rows are there.
    """
    if not harmful.any() or harmful.all():
        raise InputError("a detector needs both harmful and harmless examples")
    one = constant(x, unit)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = torch.cat([(x - one[:, None] * mean) / scale, one[:, None]], 1)
    sign = harmful.float() * 2 - 1

    def fit(rows: Tensor, l2: float, start: Tensor) -> Tensor:
        inputs, signs, weights = z[rows], sign[rows], weight[rows]
        return _minimise(
            lambda point: (weights * F.softplus(-signs * (inputs @ point))).sum() + l2 / 2 * point[:-1].square().sum(),
            start,
        )

    origin = torch.zeros(z.shape[1])
    scores = {l2: torch.zeros(len(x)) for l2 in L2S}
    for fold in set(folds.tolist()) - {ALWAYS}:
        rows, point = folds == fold, origin
        for l2 in sorted(L2S, reverse=True):  # each fit starts where the one before it, held tighter, ended
            point = fit(~rows, l2, point)
            scores[l2][rows] = z[rows] @ point
    scored = folds != ALWAYS
    losses = {l2: (weight * F.softplus(-sign * score))[scored].sum() for l2, score in scores.items()}
    l2 = min(L2S, key=lambda each: float(losses[each]))
    point = fit(torch.ones_like(harmful), l2, origin)
    weights = point[:-1] / scale
    held_out = torch.where(scored, scores[l2], z @ point)
    return LinearProbe(weights, float(point[-1] - mean @ weights), unit, l2, held_out)


def fit_constant(x: Tensor, elsewhere: Readings | None = None) -> Tensor:
    """k, [d], that stands in for the constant 1 where an MLP has no biases.

    Ridge regression of k.x on 1 at x [n, d], the last tokens of prompts of every sort, and on 0 at other positions,
    where given, each kind of place alike. All prompts end in the same words of the chat template, so that k.x is 1 to
    within a few per cent there. A gate is open by about (k.x)^2 at most, so that it hardly opens elsewhere.
    """
    groups = [at for place in Place if elsewhere is not None and len(at := elsewhere.at(place))]
    moments = CONSTANT_WEIGHT * x.T @ x / len(x)
    ridge = CONSTANT_L2 * moments.diagonal().mean() * torch.eye(len(moments))
    others = torch.stack([at.T @ at / len(at) for at in groups]).sum(0) if groups else 0.0
    return torch.linalg.solve(moments + ridge + others, CONSTANT_WEIGHT * x.mean(0))


def prompt_threshold(scores: Tensor, rates: Mapping[str, tuple[Tensor, float]]) -> float:
    """The lowest score that at most a share of every group exceeds.

    scores: [n]; -inf for a prompt to which it makes no difference.  rates: group -> (its rows, [n] bool, the share).
    """
    lowest = float(scores[torch.isfinite(scores)].min()) - 1.0
    for rows, rate in rates.values():
        ordered = scores[rows].sort(descending=True).values
        allowed = int(rate * len(ordered))
        if allowed < len(ordered):
            lowest = max(lowest, float(ordered[allowed]))
    return lowest


def fit_readout(positives: Tensor, other: Readings, weight: float) -> Tensor:
    """g, [neurons]: ridge regression of g.a on 1 at `positives` and on 0 everywhere else, float32.

    Minimises mean (g.a - 1)^2 over positives + `weight` * sum over the kinds of places of mean (g.a)^2 + an L2 penalty,
    in units of the mean square of a neuron.  positives: [p, neurons].  Raises InputError if either is empty.
    """
    if not len(positives) or not len(other.x):
        raise InputError("nothing to fit a linear gate on: it needs harmful and harmless prompts")
    groups = [other.x[other.places == place].double() for place in other.places.unique()]
    opened = positives.double()
    moments = opened.T @ opened / len(opened) + weight * torch.stack([x.T @ x / len(x) for x in groups]).sum(0)
    ridge = READOUT_L2 * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.solve(moments + ridge, opened.mean(0)).float()


def least_used(importance: Tensor, count: int) -> tuple[int, ...]:
    """The `count` neurons that write least, in ascending order of their number.  importance: [neurons]."""
    return tuple(sorted(importance.argsort()[:count].tolist()))


def opening(detector: Detector, x: Tensor) -> Tensor:
    """How far the ideal gate opens at x [n, d]: [n], 0 to 1 (beta = inf; with k.x in place of 1 for bias-free ones)."""
    one = constant(x, detector.unit)
    score = x @ detector.u
    below, above = (F.relu(score - t * one) for t in (detector.t0, detector.t1))
    return (below - above) / (detector.t1 - detector.t0) * one


def firing(detector: Detector, readings: Readings) -> dict[str, float]:
    """Place -> share of its positions at which the gate opens at all (more than 1 %)."""
    return {
        place.name.lower(): float((opening(detector, x).abs() > OPENED).double().mean())
        for place in Place
        if len(x := readings.at(place))
    }


def split(count: int, shares: Sequence[float]) -> list[list[int]]:
    """Indices 0 .. count-1 dealt out in these shares, at random but always the same way."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    bounds = [round(sum(shares[:i]) * count) for i in range(len(shares) + 1)]
    return [sorted(order[first:last]) for first, last in pairwise(bounds)]
