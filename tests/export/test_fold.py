"""The algebra of the fold: a matrix edited in blocks equals the hook on what the matrix writes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import random_basis

from guardfold.export.checkpoint.edits import Edit, Folded, ProjectColumns, ProjectRows
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection, TwoPass
from guardfold.guard.interventions.base import project_out as hook
from guardfold.guard.model.vlm import VLM

WIDTH = 12
seeds, ranks, strengths = st.integers(0, 2**32), st.integers(1, 4), st.floats(0.01, 1)


def project_out(weight: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """The formula, of a whole matrix."""
    basis = basis.to(weight)
    return weight - strength * basis.T @ (basis @ weight)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_basis(rank: int, seed: int) -> Tensor:
    """Orthonormal in float64: a float32 basis would hide errors below 1e-7."""
    return torch.linalg.qr(draw(WIDTH, rank, seed=seed)).Q.T.contiguous()


def folded(weight: Tensor, edits: Sequence[Edit]) -> Folded:
    return Folded(lambda first, last: weight[first:last], weight.shape, edits)


def in_blocks(weight: Tensor, edit: Edit, cuts: Sequence[int]) -> Tensor:
    """`edit` applied to `weight`, cut before the rows `cuts`."""
    edges = [0, *sorted(cut % len(weight) for cut in cuts), len(weight)]
    blocks = list(pairwise(edges))
    if edit.two_pass:
        for first, last in blocks:
            edit.observe(weight[first:last], first)
    return torch.cat([edit.apply(weight[first:last], first) for first, last in blocks])


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-12)


@given(ranks, strengths, seeds)
@settings(max_examples=40, deadline=None)
def test_projected_rows_write_what_the_hook_leaves(rank: int, strength: float, seed: int) -> None:
    basis = exact_basis(rank, seed)
    weight, bias, inputs = draw(WIDTH, 7, seed=seed + 1), draw(WIDTH, seed=seed + 2), draw(5, 7, seed=seed + 3)
    whole = folded(weight, [ProjectRows(basis, strength)]).rows(0, WIDTH)
    shift = folded(bias, [ProjectRows(basis, strength)]).rows(0, WIDTH)
    assert close(inputs @ whole.T + shift, hook(inputs @ weight.T + bias, basis, strength))
    assert close(whole, project_out(weight, basis, strength))


@given(ranks, strengths, seeds)
@settings(max_examples=40, deadline=None)
def test_projected_columns_embed_what_the_hook_leaves(rank: int, strength: float, seed: int) -> None:
    basis, table = exact_basis(rank, seed), draw(9, WIDTH, seed=seed + 1)
    whole = folded(table, [ProjectColumns(basis, strength)]).rows(0, 9)
    ids = torch.tensor([3, 0, 8])
    assert close(whole[ids], hook(table[ids], basis, strength))


@pytest.mark.parametrize("kind", [ProjectRows, ProjectColumns])
@given(cuts=st.lists(st.integers(0, WIDTH - 1), max_size=6), rank=ranks, strength=strengths, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_blocks_of_any_size_give_the_whole(
    kind: type[ProjectRows | ProjectColumns], cuts: list[int], rank: int, strength: float, seed: int
) -> None:
    basis, weight = exact_basis(rank, seed), draw(WIDTH, WIDTH, seed=seed + 1)
    assert close(in_blocks(weight, kind(basis, strength), cuts), in_blocks(weight, kind(basis, strength), []))


@pytest.mark.parametrize("block_bytes", [1, 4 * 2000 * 7, 10**9])
def test_a_tensor_of_many_blocks_is_folded_as_a_whole(block_bytes: int) -> None:
    basis, weight = random_basis(3, 600, 1), draw(600, 2000, seed=2)
    got = folded(weight, [ProjectRows(basis, 1.0)])
    step = max(1, block_bytes // (4 * 2000))
    rows = torch.cat([got.rows(first, min(first + step, 600)) for first in range(0, 600, step)])
    assert float((rows - project_out(weight, basis)).abs().max()) <= 1e-9
    assert float((basis.double() @ rows).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", [ProjectRows, ProjectColumns])
def test_folding_again_changes_nothing(kind: type[ProjectRows | ProjectColumns]) -> None:
    basis, weight = exact_basis(3, 1), draw(WIDTH, WIDTH, seed=2)
    once = folded(weight, [kind(basis, 1.0)]).rows(0, WIDTH)
    assert not close(once, weight)
    assert close(folded(once, [kind(basis, 1.0)]).rows(0, WIDTH), once)


def test_edits_follow_each_other() -> None:
    first, second, weight = exact_basis(1, 1), exact_basis(2, 2), draw(WIDTH, 5, seed=3)
    got = folded(weight, [ProjectRows(first, 0.5), ProjectRows(second, 1.0)]).rows(0, WIDTH)
    assert close(got, project_out(project_out(weight, first, 0.5), second))
    assert not close(got, project_out(project_out(weight, second), first, 0.5))


@pytest.mark.parametrize("kind", [ProjectRows, ProjectColumns])
def test_the_edits_given_are_left_as_they_are_and_serve_again(kind: type[ProjectRows | ProjectColumns]) -> None:
    edit, basis = kind(exact_basis(2, 1), 1.0), exact_basis(2, 1)
    first, second = draw(WIDTH, WIDTH, seed=2), draw(WIDTH, WIDTH, seed=3)
    before = dict(vars(edit))
    one, two = folded(first, [edit]), folded(second, [edit])
    assert vars(edit) == before
    expected = [in_blocks(weight, kind(basis, 1.0), []) for weight in (first, second)]
    assert close(one.rows(0, WIDTH), expected[0])
    assert close(two.rows(0, WIDTH), expected[1])
    assert close(one.rows(3, 7), expected[0][3:7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_folded_in_float32(dtype: torch.dtype) -> None:
    basis, weight = random_basis(2, WIDTH), draw(WIDTH, 6, seed=1).to(dtype)
    rows = folded(weight, [ProjectRows(basis, 1.0)]).rows(0, WIDTH)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, project_out(weight.double(), basis.double()).float(), atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tiny: VLM) -> Checkpoint:
    return Checkpoint.open(tiny.folder)


def edited(checkpoint: Checkpoint, *interventions: SublayerProjection | SharedProjection | TwoPass) -> set[str]:
    family = family_of(checkpoint)
    return set(fold(Guard(interventions), family, {n: checkpoint.info(n).shape for n in checkpoint.tensors}).edits)


def test_a_sublayer_projection_edits_its_own_layers_writers(checkpoint: Checkpoint) -> None:
    layer = "language_model.model.layers.1."
    assert edited(checkpoint, SublayerProjection({1: random_basis(1, 32)})) == {
        layer + name + part for name in ("self_attn.o_proj", "mlp.down_proj") for part in (".weight", ".bias")
    }


def test_a_shared_projection_edits_every_writer_and_never_the_head(checkpoint: Checkpoint) -> None:
    names = edited(checkpoint, SharedProjection(random_basis(1, 32)))
    assert names == {writer.disk for writer in family_of(checkpoint).writers}
    assert "language_model.lm_head.weight" not in names
    assert len(names) == 1 + 2 + 3 * 4


@pytest.mark.parametrize(
    ("intervention", "says"),
    [
        (TwoPass({1: random_basis(1, 32)}), "weights cannot hold it"),
        (SublayerProjection({3: random_basis(1, 32)}), "last layer is 2"),
        (SharedProjection(random_basis(1, 33)), "hidden size is 32"),
    ],
)
def test_what_weights_cannot_hold_or_does_not_fit_is_refused(
    checkpoint: Checkpoint, intervention: SublayerProjection | SharedProjection | TwoPass, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        edited(checkpoint, intervention)
