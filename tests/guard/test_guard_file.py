"""The guard file: what goes in comes out, and nothing unsound comes out of any file."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from zoo import random_basis

from guardfold.guard import guard
from guardfold.guard.base import untrusted
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import Gate, SharedProjection, SublayerProjection, TwoPass

WIDTH = 16
GUARD = Guard(
    (
        SublayerProjection({3: random_basis(2, WIDTH, 1), 0: random_basis(1, WIDTH, 2)}, 0.75),
        SharedProjection(random_basis(3, WIDTH, 3)),
        TwoPass({1: random_basis(2, WIDTH, 4)}, alpha=1.5, project=True),
    ),
    {"model": "owner/name", "directions": {"gap": {"0": 1.25}}, "note": "é"},
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    GUARD.save(tmp_path / "guard.safetensors")
    return tmp_path / "guard.safetensors"


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["guardfold"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write(path: Path, header: Any, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, {"guardfold": header if isinstance(header, str) else json.dumps(header)})


def refused(path: Path) -> str:
    """What is said of the file `path`: one line that names it."""
    with pytest.raises(InputError) as error:
        Guard.load(path)
    said = str(error.value)
    assert str(path) in said
    assert "\n" not in said
    return said


def test_a_guard_survives_its_file(saved: Path) -> None:
    loaded = Guard.load(saved)
    assert loaded.describe() == GUARD.describe()
    assert loaded.provenance == GUARD.provenance
    for a, b in zip(loaded.interventions, GUARD.interventions, strict=True):
        assert type(a) is type(b)
        assert {k: v.tolist() for k, v in a.tensors().items()} == {k: v.tolist() for k, v in b.tensors().items()}
        wanted = torch.float32 if isinstance(a, Gate) else torch.float64
        assert all(tensor.dtype == wanted for tensor in a.tensors().values())
    assert loaded.hash == GUARD.hash
    assert loaded.to_bytes() == saved.read_bytes()


def test_a_float32_basis_becomes_orthonormal_to_the_last_place_and_stays_so(tmp_path: Path) -> None:
    given = random_basis(3, WIDTH, 4).float()
    gram = given.double() @ given.double().T
    assert (gram - torch.eye(3)).abs().max() > 1e-9, "nothing to mend"
    guard = Guard((SharedProjection(given),))
    guard.save(tmp_path / "guard.safetensors")
    for (each,) in (guard.interventions, Guard.load(tmp_path / "guard.safetensors").interventions):
        assert isinstance(each, SharedProjection)
        assert (each.basis @ each.basis.T - torch.eye(3)).abs().max() <= 1e-14
        assert torch.allclose(each.basis.float(), given, atol=1e-6)


def test_the_hash_depends_on_content_alone() -> None:
    again = Guard(GUARD.interventions, dict(reversed(list(GUARD.provenance.items()))))
    assert again.hash == GUARD.hash
    first: Any = GUARD.interventions[0]
    reordered = SublayerProjection(dict(reversed(list(first.bases.items()))), 0.75)
    assert Guard((reordered, *GUARD.interventions[1:]), GUARD.provenance).hash == GUARD.hash
    changed = [
        Guard(GUARD.interventions[:2], GUARD.provenance),
        Guard(GUARD.interventions[::-1], GUARD.provenance),
        Guard(GUARD.interventions, {}),
        Guard((SharedProjection(random_basis(1, WIDTH, 9)),)),
        Guard((SharedProjection(random_basis(1, WIDTH, 9), 0.5),)),
    ]
    assert len({GUARD.hash, *(guard.hash for guard in changed)}) == 1 + len(changed)


def test_saving_replaces_the_file_and_leaves_nothing_beside_it(saved: Path) -> None:
    other = Guard(GUARD.interventions[:1])
    other.save(saved)
    assert Guard.load(saved).hash == other.hash
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("parent", ["absent", "guard.safetensors"])
def test_a_place_that_cannot_be_written_is_an_input_error(saved: Path, parent: str) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        GUARD.save(saved.parent / parent / "guard.safetensors")


FILES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a guard"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"0/0": [1.0]})),
    "torch pickle": lambda path: torch.save({"0/0": torch.ones(1, 4)}, path),
    "safetensors without metadata": lambda path: save_file({"0/0": torch.ones(1, 4)}, path),
    "other metadata": lambda path: save_file({"0/0": torch.ones(1, 4)}, path, {"format": "pt"}),
    "metadata not JSON": lambda path: write(path, "{", {"0/0": torch.ones(1, 4)}),
    "metadata too deep": lambda path: write(path, "[" * 100_000, {"0/0": torch.ones(1, 4)}),
    "metadata a list": lambda path: write(path, [], {"0/0": torch.ones(1, 4)}),
    "another format": lambda path: write(path, {"format": "guardfold-guard/99"}, {"0/0": torch.ones(1, 4)}),
    "no interventions": lambda path: write(
        path, {"format": "guardfold-guard/1", "interventions": [], "provenance": {}}, {"0/0": torch.ones(1, 4)}
    ),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", FILES)
def test_what_is_not_a_guard_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "some.safetensors"
    FILES[kind](path)
    assert refused(path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "some.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert refused(tmp_path / "some.safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, kept: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(kept * len(data))])
    assert refused(saved)


def _header(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda header, tensors: change(header["interventions"])


def _tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda header, tensors: change(tensors)


def _provenance(value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], Any]:
    return lambda header, tensors: header.update(provenance=value)


LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Tensor]], Any], str]] = {
    "rank": (_header(lambda each: each[0]["ranks"].update({"3": 1})), "does not describe"),
    "shared rank": (_header(lambda each: each[1].update(rank=2)), "does not describe"),
    "layer too many": (_header(lambda each: each[0]["ranks"].update({"5": 1})), "does not describe"),
    "layer too few": (_header(lambda each: each[0]["ranks"].pop("3")), "does not describe"),
    "two-pass layers": (_header(lambda each: each[2].update(layers=[2])), "does not describe"),
    "more than it knows": (_header(lambda each: each[1].update(scope="half")), "does not describe"),
    "kind": (_header(lambda each: each[1].update(kind="sparse-autoencoder")), "unknown intervention"),
    "another format": (lambda header, _: header.update(format="guardfold-guard/99"), "not a guard file"),
    "no kind": (_header(lambda each: each[1].pop("kind")), "damaged"),
    "not a list": (lambda header, _: header.update(interventions=7), "damaged"),
    "no provenance": (lambda header, _: header.pop("provenance"), "damaged"),
    **{f"provenance {value!r}": (_provenance(value), "not an object") for value in ([], "x", 5, None, [[1, 2]])},
    "half a character": (_provenance({"a": ["\ud800"]}), "damaged"),
    "strength 0": (_header(lambda each: each[0].update(strength=0.0)), r"strength 0\.0 is not in \(0, 1\]"),
    "strength above 1": (_header(lambda each: each[0].update(strength=1.5)), r"strength 1\.5"),
    "strength negative": (_header(lambda each: each[1].update(strength=-0.5)), r"strength -0\.5"),
    "strength NaN": (_header(lambda each: each[1].update(strength=float("nan"))), "strength nan"),
    "strength text": (_header(lambda each: each[1].update(strength="1")), "strength '1'"),
    "NaN": (_tensors(lambda each: each["0/3"][0].fill_(float("nan"))), "NaN or Inf"),
    "Inf": (_tensors(lambda each: each["1/basis"][0].fill_(float("inf"))), "NaN or Inf"),
    "scaled": (_tensors(lambda each: each["0/3"].mul_(1.01)), "not orthonormal"),
    "dependent": (_tensors(lambda each: each["0/3"][1].copy_(each["0/3"][0])), "not orthonormal"),
    "zero": (_tensors(lambda each: each["2/1"].zero_()), "not orthonormal"),
    "one axis": (_tensors(lambda each: each.update({"1/basis": torch.ones(WIDTH)})), "shape"),
    "more rows than columns": (
        _tensors(lambda each: each.update({"1/basis": torch.eye(4)[:, :3].contiguous()})),
        "shape",
    ),
    "no rows": (_tensors(lambda each: each.update({"1/basis": torch.ones(0, WIDTH)})), "shape"),
    "missing tensor": (_tensors(lambda each: each.pop("1/basis")), "damaged"),
    "layer not a number": (_tensors(lambda each: each.update({"0/x": each.pop("0/3")})), "not a layer number"),
    "layer negative": (_tensors(lambda each: each.update({"0/-1": each.pop("0/3")})), "not a layer number"),
    "complex": (
        _tensors(lambda each: each.update({"0/3": each["0/3"].to(torch.complex64)})),
        r"sublayer-projection, layer 3: a torch.complex64 tensor, where torch.float64",
    ),
    "whole numbers": (
        _tensors(lambda each: each.update({"1/basis": torch.eye(WIDTH, dtype=torch.int64)[:3].contiguous()})),
        r"shared-projection: a torch.int64 tensor",
    ),
    "float8": (
        _tensors(lambda each: each.update({"1/basis": torch.eye(WIDTH)[:3].to(torch.float8_e4m3fn)})),
        r"shared-projection: a torch.float8_e4m3fn tensor",
    ),
    "no layers": (_tensors(lambda each: [each.pop(name) for name in ("0/0", "0/3")]), "no layers"),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_a_gates_vector_is_of_floating_point_numbers(dtype: torch.dtype) -> None:
    vectors: dict[str, Any] = {"detector": torch.eye(4)[0], "column": torch.ones(4), "unit": torch.ones(4)}
    for name in vectors:
        with pytest.raises(InputError, match=f"^gate, {name}: a {dtype} tensor, where"):
            Gate(0, t0=0.0, t1=1.0, **vectors | {name: vectors[name].to(dtype)})


def test_metadata_that_would_fill_the_memory_is_refused_unread(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header, tensors = parts(saved)
    write(saved, header | {"provenance": {"a": [[]] * 2000}}, tensors)
    with monkeypatch.context() as patch:
        patch.setattr(untrusted, "MAX_PARTS", 1000)
        assert "not sound JSON (over 1000 values)" in refused(saved)
    monkeypatch.setattr(guard, "MAX_GUARD_HEADER_BYTES", 1000)
    assert re.search(r"damaged guard file \(a header of \d+ bytes\)", refused(saved))


@pytest.mark.parametrize("lie", LIES)
def test_a_guard_file_that_lies_is_refused(saved: Path, lie: str) -> None:
    change, says = LIES[lie]
    header, tensors = parts(saved)
    change(header, tensors)
    write(saved, header, tensors)
    with pytest.raises(InputError, match=says):
        Guard.load(saved)
    assert refused(saved)
