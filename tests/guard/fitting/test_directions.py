"""Safety steering directions: what is planted is found, the right way round, and scored honestly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import random_basis

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting.directions import Directions, auc, cross_fitted_auc, extract, steering_basis
from guardfold.guard.fitting.states import prompt_states
from guardfold.guard.model.vlm import VLM
from guardfold.guard.presets.projection import best_layer, projection
from guardfold.guard.prompts.image_kinds import ANCHOR_KINDS
from guardfold.guard.prompts.prompts import Anchors, Prompt

HARMFUL = (
    "how to steal a car ?",
    "how to open a lock ?",
    "how to steal paint ?",
    "why steal bread ?",
    "steal a wall ?",
)
HARMLESS = (
    "how to paint a car ?",
    "how to paint a wall ?",
    "how to bake bread ?",
    "why bake bread ?",
    "paint a wall ?",
)
ANCHORS = Anchors(HARMFUL, HARMLESS)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 2**32), flip=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_planted_direction_is_found_and_points_to_harm(seed: int, flip: bool) -> None:
    planted = random_basis(1, 24, seed)[0] * (-1 if flip else 1)
    sizes = 1 + torch.rand(40, 1, generator=draw(seed))
    differences = sizes * planted + 0.05 * torch.randn(40, 24, generator=draw(seed + 1))
    basis, _ = steering_basis(differences, 1)
    assert basis[0] @ planted > 0.99


@given(pairs=st.integers(4, 30), rank=st.integers(1, 4), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_the_basis_is_that_of_the_svd(pairs: int, rank: int, seed: int) -> None:
    differences = torch.randn(pairs, 12, generator=draw(seed)) + 0.2
    basis, values = steering_basis(differences, rank)
    assert basis.shape == (rank, 12)
    assert torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-5)
    assert (basis @ differences.mean(0) >= 0).all()
    assert values.shape == (min(pairs, 12),)
    assert (values.diff() <= 0).all()
    assert torch.allclose(values.square().sum(), differences.square().sum(), rtol=1e-4)
    assert torch.allclose((differences @ basis.T).norm(dim=0), values[:rank], rtol=1e-3)


scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_counts_pairs(positives: list[float], negatives: list[float]) -> None:
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    expected = wins / (len(positives) * len(negatives))
    assert auc(torch.tensor(positives), torch.tensor(negatives)) == pytest.approx(expected)
    assert auc(torch.tensor(negatives), torch.tensor(positives)) == pytest.approx(1 - expected)


def test_a_direction_scores_half_on_noise_and_one_on_a_signal() -> None:
    generator = draw(0)
    noise = [[torch.randn(60, 48, generator=generator) for _ in range(2)] for _ in range(20)]
    mean = sum(cross_fitted_auc((a, b), (a, b)) for a, b in noise) / len(noise)
    assert abs(mean - 0.5) < 0.05  # scored on the pairs it was fitted to, it would be about 0.9
    a, b = noise[0]
    assert cross_fitted_auc((a + 3, b - 3), (a + 3, b - 3)) == 1.0
    assert cross_fitted_auc((a + 3, b - 3), (b - 3, a + 3)) == 0.0


@pytest.fixture(scope="module")
def directions(tiny: VLM) -> Directions:
    return extract(tiny, ANCHORS, [0, 2], rank=3)


def test_extraction_is_the_svd_of_text_only_states_layer_by_layer(tiny: VLM, directions: Directions) -> None:
    harmful, harmless = (prompt_states(tiny, [Prompt(t) for t in texts], [0, 2], "") for texts in (HARMFUL, HARMLESS))
    assert set(directions.bases) == {0, 2}
    for layer, basis in directions.bases.items():
        differences = harmful[layer] - harmless[layer]
        _, s, w = torch.linalg.svd(differences, full_matrices=False)
        overlap = (basis @ w[:3].T).diagonal().abs()
        assert torch.allclose(overlap, torch.ones(3), atol=1e-3)
        assert torch.allclose(torch.tensor(directions.singular_values[layer]), s, rtol=1e-3, atol=1e-4)
        assert directions.gap[layer] == pytest.approx(float(differences.mean(0) @ basis[0]), rel=1e-3)
        assert directions.gap[layer] >= 0


def test_every_extraction_kind_is_scored_and_pictures_with_words_are_not_used(directions: Directions) -> None:
    assert set(directions.auc) == set(ANCHOR_KINDS) == {"text", "blank", "noise", "shape"}
    for per_layer in directions.auc.values():
        assert set(per_layer) == {0, 2}
        assert all(0 <= score <= 1 for score in per_layer.values())


@pytest.mark.parametrize("rank", [0, 6, 33])
def test_a_rank_that_the_anchors_cannot_give_is_refused(tiny: VLM, rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}: .* number of anchor pairs, 5"):
        extract(tiny, ANCHORS, [0], rank)


def test_too_few_anchors_are_refused(tiny: VLM) -> None:
    with pytest.raises(InputError, match="3 anchor pairs are too few"):
        extract(tiny, ANCHORS.head(3), [0])


def test_anchors_that_do_not_differ_are_refused(tiny: VLM) -> None:
    with pytest.raises(InputError):
        extract(tiny, Anchors(HARMFUL, HARMFUL), [0])


def test_the_preset_takes_own_directions_per_layer_or_those_of_the_best(directions: Directions) -> None:
    own = projection(directions, [0, 2], "sublayers", 0.5)
    assert own.describe() == {"kind": "sublayer-projection", "strength": 0.5, "ranks": {0: 3, 2: 3}}
    assert projection(directions, [2], "sublayers", 1.0).layers == [2]
    shared = projection(directions, [0, 2], "shared", 1.0)
    assert torch.allclose(shared.tensors()["basis"].float(), directions.bases[best_layer(directions)])
    assert torch.allclose(projection(directions, [0], "shared", 1.0).tensors()["basis"].float(), directions.bases[0])


def test_the_best_layer_separates_text_best_and_is_the_uppermost_of_equals() -> None:
    scores = {1: 0.7, 2: 0.9, 3: 0.9, 4: 0.8}
    made = Directions(dict.fromkeys(scores, random_basis(1, 8)), {}, {}, {"text": scores})
    assert best_layer(made) == 3
