"""Rounding with repair: what the projection removed stays removed in the dtype, at little cost to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from zoo import random_basis

from guardfold.export.checkpoint.edits import Edit, Folded, ProjectColumns, ProjectRows, SetColumns
from guardfold.export.checkpoint.headers import DTYPES, Checkpoint, TensorInfo
from guardfold.export.checkpoint.rounding import CANDIDATES, FINE, Block, candidates, nearest, repaired
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection
from guardfold.validators.demo import DEMO
from guardfold.validators.evidence.leaks import tensor_tolerance

NARROW = st.sampled_from([torch.float16, torch.bfloat16])
RMS = 0.02


def weights(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (RMS * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assembled(parts: Iterator[Block], like: Tensor) -> Tensor:
    whole, times = torch.zeros_like(like), torch.zeros(len(like))
    for rows, runs in parts:
        for first, last, place in runs:
            whole[first:last] = rows[place : place + last - first]
            times[first:last] += 1
    assert torch.equal(times, torch.ones(len(like))), "each row comes once"
    return whole


class _Rounded:
    """A tensor folded and rounded in both ways, and what that did, in float64."""

    def __init__(self, weight: Tensor, edits: Sequence[Edit], basis: Tensor, axis: int) -> None:
        folded = Folded(lambda first, last: weight[first:last], weight.shape, edits)
        self.exact = folded.rows(0, len(weight)).double()
        self.basis, self.axis = basis.double(), axis
        self.component = float(self.along(weight.double()).norm())
        self.nearest = assembled(nearest(folded, weight.dtype), weight)
        self.repaired = assembled(repaired(folded, weight.dtype, basis, axis), weight)

    def along(self, weight: Tensor) -> Tensor:
        return torch.tensordot(self.basis, weight, ([1], [self.axis]))

    def leak(self, rounded: Tensor) -> float:
        """||V (W' - W)|| / ||V W0||, W the exact fold and W0 what it was made from."""
        return float(self.along(rounded.double() - self.exact).norm()) / self.component

    def error(self, rounded: Tensor) -> float:
        return float((rounded.double() - self.exact).norm())

    @property
    def more_error(self) -> float:
        return self.error(self.repaired) / self.error(self.nearest) - 1


def rows(width: int, columns: int, rank: int, dtype: torch.dtype, seed: int = 0, strength: float = 1.0) -> _Rounded:
    basis = random_basis(rank, width, seed)
    weight = weights(width, columns, dtype=dtype, seed=seed + 1)
    return _Rounded(weight, [ProjectRows(basis, strength)], basis, 0)


def columns(count: int, width: int, rank: int, dtype: torch.dtype, seed: int = 0, strength: float = 1.0) -> _Rounded:
    basis = random_basis(rank, width, seed)
    weight = weights(count, width, dtype=dtype, seed=seed + 1)
    return _Rounded(weight, [ProjectColumns(basis, strength)], basis, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "rank"), [(256, 1), (512, 2), (1024, 4), (2048, 8), (4096, 1)])
@pytest.mark.parametrize("kind", [rows, columns], ids=["rows", "columns"])
def test_the_direction_is_gone_and_the_weights_hardly_differ(
    kind: Callable[..., _Rounded], width: int, rank: int, dtype: torch.dtype
) -> None:
    sizes = (width, 96) if kind is rows else (96, width)
    made = kind(*sizes, rank, dtype)
    assert made.leak(made.nearest) >= (1e-3 if dtype == torch.bfloat16 else 1e-4)
    assert made.leak(made.repaired) <= 1e-5
    assert made.more_error <= 0.05


@given(
    st.sampled_from([rows, columns]),
    st.integers(1, 8),
    st.integers(1, 12),
    st.integers(1, 20),
    st.sampled_from([1.0, 0.5, 0.1]),
    NARROW,
    st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_repair_never_leaves_more_than_the_leak_detector_allows_nor_moves_an_entry_by_more_than_two_steps(
    kind: Callable[..., _Rounded], rank: int, times: int, count: int, strength: float, dtype: torch.dtype, seed: int
) -> None:
    width = 16 * rank * times
    sizes = (width, count) if kind is rows else (count, width)
    made = kind(*sizes, rank, dtype, seed, strength)
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    scale = max(1.0, (rank / width) ** 0.5 * float(made.exact.norm()) / made.component)
    info = TensorInfo("w", name, tuple(made.exact.shape), 0, 0)
    assert made.leak(made.repaired) / scale <= tensor_tolerance(info, [ProjectRows(made.basis, 1.0)], "repair")
    limits = torch.finfo(dtype)
    largest = torch.maximum(made.nearest.double().abs(), made.repaired.double().abs())
    step = limits.eps * torch.exp2(largest.clamp(min=limits.tiny).log2().floor())
    assert ((made.repaired.double() - made.nearest.double()).abs() <= 2 * step).all()


@pytest.mark.parametrize("strength", [0.9, 0.5, 0.25])
def test_a_partial_projection_keeps_exactly_its_part(strength: float) -> None:
    made = rows(4096, 64, 1, torch.bfloat16, strength=strength)
    assert made.leak(made.nearest) > 1e-3
    assert made.leak(made.repaired) <= 1e-5
    assert made.more_error <= 0.05


def test_a_weak_component_which_rounding_to_nearest_would_keep_is_removed() -> None:
    """A tenth of what a random direction has: nearly every correction is below half a step, so more are undone."""
    basis = random_basis(1, 4096)
    weight = weights(4096, 64, dtype=torch.float32, seed=1)
    weight -= 0.9 * basis.T @ (basis @ weight)
    made = _Rounded(weight.bfloat16(), [ProjectRows(basis, 1.0)], basis, 0)
    assert made.leak(made.nearest) > 0.2
    assert made.leak(made.repaired) <= 1e-5
    assert made.more_error <= 0.2


@pytest.mark.parametrize("axis", [1, 2])
def test_each_expert_is_repaired_on_its_own(axis: int) -> None:
    basis = random_basis(2, 512)

    class Project:
        """W - V^T V W along `axis`."""

        two_pass = False

        def observe(self, block: Tensor, first: int) -> None:
            pass

        def apply(self, block: Tensor, first: int) -> Tensor:
            turned = block.movedim(axis, -1)
            return (turned - (turned @ basis.T) @ basis).movedim(-1, axis)

    shape = (5, 512, 24) if axis == 1 else (5, 24, 512)
    made = _Rounded(weights(*shape, dtype=torch.bfloat16, seed=3), [Project()], basis, axis)
    assert made.leak(made.nearest) > 1e-3
    assert made.leak(made.repaired) <= 1e-5
    assert made.more_error <= 0.05


def test_a_bias_is_repaired_as_a_matrix_of_one_column() -> None:
    basis = random_basis(1, 4096)
    made = _Rounded(weights(4096, dtype=torch.bfloat16, seed=2), [ProjectRows(basis, 1.0)], basis, 0)
    assert made.leak(made.repaired) <= 1e-5


@pytest.mark.parametrize(("rank", "left"), [(1, 1e-6), (2, 5e-6), (4, 2e-5), (8, 4e-5)])
@pytest.mark.parametrize("seed", range(3))
def test_a_bias_of_equal_numbers_is_repaired_too(seed: int, rank: int, left: float) -> None:
    """All its steps are equal, so only small |v_i| take away what is left. 1: what a random direction has of it."""
    basis = random_basis(rank, 4096, seed)
    made = _Rounded(torch.ones(4096, dtype=torch.bfloat16), [ProjectRows(basis, 1.0)], basis, 0)
    assert made.leak(made.nearest) * made.component > 1e-4
    assert made.leak(made.repaired) * made.component <= left * rank**0.5


@pytest.mark.parametrize("seed", range(3))
def test_the_weak_component_of_a_bias_of_equal_numbers_is_removed(seed: int) -> None:
    """A hundredth of a random direction's: what float32 loses in adding up 4096 products is more than 1e-5 of it."""
    basis = random_basis(1, 4096, seed)
    basis = torch.nn.functional.normalize(basis - basis.mean() + 0.01 / 4096)
    weight = torch.ones(4096, dtype=torch.bfloat16)
    made = _Rounded(weight, [ProjectRows(basis, 1.0)], basis, 0)
    assert 0.005 < made.component < 0.02
    assert float(made.along(made.repaired.double()).norm()) <= 1e-5 * made.component


@pytest.mark.parametrize(("shape", "axis"), [((0, 512), 1), ((512, 0), 0)])
def test_a_tensor_without_entries_is_repaired_as_well(shape: tuple[int, int], axis: int) -> None:
    basis = random_basis(1, 512)
    edit = ProjectColumns(basis, 1.0) if axis else ProjectRows(basis, 1.0)
    assert _Rounded(torch.empty(shape, dtype=torch.bfloat16), [edit], basis, axis).repaired.shape == shape


def test_what_a_gate_writes_after_the_projection_is_kept() -> None:
    """The residual is measured against the exact fold, whatever edits it has."""
    basis = random_basis(1, 512)
    column = basis[0] * 0.7
    weight = weights(512, 40, dtype=torch.bfloat16, seed=2)
    made = _Rounded(weight, [ProjectRows(basis, 1.0), SetColumns({7: column})], basis, 0)
    assert made.leak(made.repaired) <= 1e-5
    assert float(basis[0].double() @ made.repaired[:, 7].double()) == pytest.approx(0.7, rel=1e-5)


def test_zeros_and_the_largest_numbers_stay_what_they_are_and_infinity_is_left_to_be_seen() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        basis = random_basis(1, 512)
        weight = weights(512, 8, dtype=dtype, seed=4)
        weight[:, 0] = 0
        weight[::2, 1] = 0
        weight[3, 2] = torch.finfo(dtype).max
        folded = Folded(lambda first, last: weight[first:last].clone(), weight.shape, [])  # noqa: B023
        got = assembled(repaired(folded, dtype, basis, 0), weight)
        assert torch.equal(got, weight), "nothing was edited, so nothing is to be repaired"
        weight[5, 3] = float("inf")
        found = assembled(repaired(folded, dtype, basis, 0), weight)
        assert not torch.isfinite(found).all()


def test_a_direction_that_many_rows_do_not_have_is_removed_all_the_same() -> None:
    basis = torch.zeros(2, 1024)
    basis[:, ::8] = random_basis(2, 128)
    weight = weights(1024, 32, dtype=torch.bfloat16, seed=5)
    made = _Rounded(weight, [ProjectRows(basis, 1.0)], basis, 0)
    assert made.leak(made.repaired) <= 1e-4 < 1e-3 < made.leak(made.nearest)


def test_weights_below_the_normal_range_of_float16_are_repaired_in_its_steps() -> None:
    basis = random_basis(1, 2048)
    weight = weights(2048, 32, dtype=torch.float32, seed=6).mul_(1e-3).half()
    made = _Rounded(weight, [ProjectRows(basis, 1.0)], basis, 0)
    assert made.leak(made.nearest) > 1e-3
    assert made.leak(made.repaired) <= 1e-4


def test_a_repair_does_not_overflow() -> None:
    """Half of the entries are as large as float16 goes; what rounding left of them must be taken from the others."""
    basis = random_basis(1, 512)
    weight = 3e4 * weights(512, 16, dtype=torch.float32, seed=7).sign()
    weight = (weight - basis.T @ (basis @ weight)).half()
    weight[::2] = weight[::2].sign() * torch.finfo(torch.float16).max
    shift = torch.zeros(16)

    class Shift:
        """Rounds away a third of a step of the largest numbers, so that there is a residual."""

        two_pass = False

        def observe(self, block: Tensor, first: int) -> None:
            pass

        def apply(self, block: Tensor, first: int) -> Tensor:
            return block + 10 * basis[0, first : first + len(block), None].sign() + shift

    folded = Folded(lambda first, last: weight[first:last], weight.shape, [Shift()])
    got = assembled(repaired(folded, torch.float16, basis, 0), weight)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, weight)


def test_candidates_are_all_rows_or_the_largest_and_a_spread_of_the_others() -> None:
    many = 10**5
    assert candidates(random_basis(2, CANDIDATES), many).tolist() == list(range(CANDIDATES))
    basis = random_basis(2, 3000)
    assert candidates(basis, 1).tolist() == list(range(3000))
    chosen = candidates(basis, many).tolist()
    assert len(chosen) == CANDIDATES == len(set(chosen))
    ranked = basis.norm(dim=0).argsort(descending=True).tolist()
    assert set(ranked[: CANDIDATES - FINE]) <= set(chosen)
    assert ranked[-1] in chosen


@pytest.mark.parametrize(("rank", "leak", "more"), [(1, 1e-5, 0.05), (2, 1e-5, 0.05), (4, 1e-5, 0.08), (8, 2e-5, 0.15)])
def test_the_demos_weights_are_repaired(rank: int, leak: float, more: float) -> None:
    """Trained weights, 128 wide, float16; so few entries a column have too few roundings for 4 directions and more."""
    checkpoint = Checkpoint.open(DEMO)
    basis = random_basis(rank, 128)
    edits = fold(Guard((SharedProjection(basis),)), family_of(checkpoint), checkpoint.shapes).edits
    matrices = [name for name in edits if len(checkpoint.info(name).shape) == 2]
    assert len(matrices) == 10
    errors = {"nearest": 0.0, "repaired": 0.0}
    for name in matrices:
        weight = checkpoint.read(name)
        assert weight.dtype == DTYPES["F16"]
        axis = 1 if isinstance(edits[name][0], ProjectColumns) else 0
        made = _Rounded(weight, edits[name], basis, axis)
        assert made.leak(made.repaired) <= leak, name
        errors["nearest"] += made.error(made.nearest) ** 2
        errors["repaired"] += made.error(made.repaired) ** 2
    assert errors["repaired"] ** 0.5 <= (1 + more) * errors["nearest"] ** 0.5
