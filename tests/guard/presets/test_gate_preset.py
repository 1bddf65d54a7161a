"""The gate preset's thresholds: rates of prompts that are newly refused."""

from __future__ import annotations

import torch
from torch import Tensor

from guardfold.guard.fitting.last_tokens import Asked, Group, LastTokens
from guardfold.guard.fitting.linear_probe import LinearProbe
from guardfold.guard.presets.gate import MISSED, detect, recall, threshold
from guardfold.guard.prompts.image_kinds import TEXT
from guardfold.guard.prompts.prompts import Prompt


def last_tokens(groups: dict[Group, int], refused: Tensor) -> LastTokens:
    asked = [Asked(Prompt("why ?"), group, TEXT, 0) for group, count in groups.items() for _ in range(count)]
    return LastTokens(tuple(asked), {}, {}, refused)


def probe_with(scores: Tensor) -> LinearProbe:
    return LinearProbe(torch.tensor([1.0, 0.0]), 0.0, None, 0.1, scores)


def test_prompts_that_are_refused_anyway_do_not_raise_the_threshold() -> None:
    scores = torch.cat([torch.full((10,), 9.0), torch.arange(100.0) / 100])  # harmful, benign
    refused = torch.zeros(110, dtype=torch.bool)
    last = last_tokens({"harmful": 10, "benign": 100}, refused)
    assert threshold(probe_with(scores), last, 0.01) == scores[-2]
    refused[-50:] = True
    assert threshold(probe_with(scores), last, 0.01) == scores[-52]


def test_a_gate_opens_as_rarely_as_costs_few_harmful_prompts_and_never_oftener_than_asked() -> None:
    harmful = torch.arange(100.0)
    last = last_tokens({"harmful": 100, "benign": 100}, torch.zeros(200, dtype=torch.bool))
    apart = probe_with(torch.cat([harmful, torch.full((100,), -9.0)]))
    detector = detect(apart, last, 0.05)
    assert abs(detector.t0 - float(harmful.quantile(MISSED * 0.05))) < 1e-4
    assert recall(apart, last, detector.t0) >= 1 - MISSED * 0.05
    mixed = probe_with(torch.cat([harmful, torch.full((100,), 50.0)]))
    assert abs(detect(mixed, last, 0.05).t0 - 50.0) < 1e-4
