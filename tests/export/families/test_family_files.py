"""Families that the user brings, folds that are approximate by nature, and what is said of both."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deadline import within
from specimens import Knobs, Specimen, build
from specimens.known import KNOWN
from specimens.llava_kind import CLIP, FEATURES, llava, square
from zoo import random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import MAX_FAMILY_BYTES, Table, family_of
from guardfold.guard.base.errors import InputError, Refused
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection
from guardfold.guard.model.vlm import ALIASES, located
from guardfold.pipeline import GuardOptions, check_guarded, export_guarded, trace_family

UNKNOWN = Specimen("llava+falcon", partial(llava, "llava", "falcon", CLIP, FEATURES), square)


def save(specimen: Specimen, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build(specimen, Knobs(bias=False), dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def guard(tmp_path: Path) -> str:
    path = tmp_path / "guard.safetensors"
    Guard((SharedProjection(random_basis(2, 32)),)).save(path)
    return str(path)


def test_a_family_without_a_row_is_folded_exactly_by_its_traced_row(tmp_path: Path, guard: str) -> None:
    folder, row = save(UNKNOWN, tmp_path / "model"), tmp_path / "row.toml"
    with pytest.raises(InputError, match="text model 'falcon' has no row"):
        export_guarded(str(folder), tmp_path / "out", GuardOptions(guard), skip_behaviour=True)
    row.write_text(trace_family(str(folder)))
    made = export_guarded(str(folder), tmp_path / "out", GuardOptions(guard, family=row), skip_behaviour=True)
    equal = made.evidence.equivalence
    assert equal and equal.passed and equal.approximate is None and equal.exact <= 1e-5
    assert set(equal.compared) == {"text", "image"}
    assert check_guarded(tmp_path / "out", str(folder), skip_behaviour=True, family_file=row).sound


def test_a_row_that_forgets_a_writer_is_refused_not_published(tmp_path: Path, guard: str) -> None:
    folder, row = save(UNKNOWN, tmp_path / "model"), tmp_path / "row.toml"
    traced = trace_family(str(folder))
    forgotten = '[[text.writer]]\nrole = "attention"\nmodule = "h.{layer}.self_attention.dense"\n'
    assert forgotten in traced
    row.write_text(traced.replace(forgotten, ""))
    with pytest.raises(Refused, match="not sound"):
        export_guarded(str(folder), tmp_path / "out", GuardOptions(guard, family=row), skip_behaviour=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    (gemma3,) = (specimen for specimen in KNOWN if specimen.name == "gemma3")
    return save(gemma3, tmp_path / "gemma")


def test_an_approximate_fold_says_so_with_its_error(tmp_path: Path, gemma: Path, guard: str) -> None:
    made = export_guarded(str(gemma), tmp_path / "out", GuardOptions(guard), skip_behaviour=True)
    equal: Any = made.evidence.equivalence
    assert equal.approximate and 1e-4 < equal.exact < 0.5 * equal.edit and equal.activation_leak <= 1e-5
    said = json.loads((tmp_path / "out" / "report.json").read_text())["equivalence"]
    assert said["exact"] == equal.exact and said["approximate"] == equal.approximate
    for name in ("README.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "APPROXIMATE" in text and f"{equal.exact:.1e}" in text


def test_strict_refuses_what_is_approximate_and_nothing_else(tmp_path: Path, gemma: Path, guard: str) -> None:
    with pytest.raises(Refused, match="--strict: gemma3: norms after the sublayers"):
        export_guarded(str(gemma), tmp_path / "out", GuardOptions(guard), skip_behaviour=True, strict=True)
    assert not (tmp_path / "out").exists()
    (plain,) = (specimen for specimen in KNOWN if specimen.name == "llava+llama")
    folder = save(plain, tmp_path / "plain")
    assert export_guarded(str(folder), tmp_path / "out", GuardOptions(guard), skip_behaviour=True, strict=True)


WRITER = '[text]\nmodel_types = ["llama"]\n[[text.writer]]\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[text", "not a family file"),
        ("", r"needs \[text\] or \[vision\]"),
        ("[layers]\n", r"needs \[text\] or \[vision\]"),
        ("[text]\nwriter = []\n", "needs model_types"),
        ('[text]\nmodel_types = "llama"\n', "needs model_types"),
        (WRITER + 'module = "a"\n', "needs a role"),
        (WRITER + 'role = "poet"\nmodule = "a"\n', "needs a role"),
        (WRITER + 'role = "mlp"\n', "a module or a parameter"),
        (WRITER + 'role = "mlp"\nmodule = "a"\nparameter = "b"\n', "a module or a parameter"),
        (WRITER + 'role = "mlp"\nmodule = "a"\naxis = 3\n', "axis 3 is not 0, 1 or 2"),
        (WRITER + 'role = "mlp"\nmodule = "a"\naxis = "0"\n', "axis '0' is not 0, 1 or 2"),
        (WRITER + 'role = "mlp"\nmodule = "a"\npost_norm = 1\n', "post_norm is not a name"),
        ("text = 1\n", "needs model_types"),
        ('[text]\nmodel_types = ["llama"]\nwriter = 1\n', "writer is not a list of tables"),
        ('[text]\nmodel_types = ["llama"]\nmlp = ["a"]\n', "mlp is not a list of tables"),
        ('[text]\nmodel_types = ["llama"]\n[[text.mlp]]\ngate = "a"\n', "needs the names of gate and down"),
        ('[text]\nmodel_types = ["llama"]\nrefused = 1\n', "not a reason in words"),
    ],
)
def test_a_bad_family_file_is_one_line(tmp_path: Path, tiny_folder: Path, content: str, complaint: str) -> None:
    path = tmp_path / "row.toml"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        family_of(Checkpoint.open(tiny_folder), path)
    assert "\n" not in str(caught.value) and "row.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("nothing", "no such file"),
        ("large", "larger than"),
        ("nested too deep", "not a family file"),
    ],
)
def test_what_is_no_file_or_too_large_is_no_family_file(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "row.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "nothing":
        path.write_bytes(b"a=" + b"[" * (MAX_FAMILY_BYTES if kind == "large" else 50_000))
    with within(20), pytest.raises(InputError, match=rf"row\.toml: {says}"):
        Table.built_in().with_file(path)


def test_a_row_that_matches_nothing_is_refused_by_name(tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "row.toml"
    path.write_text('[vision]\nmodel_types = ["llava"]\n[[vision.writer]]\nrole = "vision"\nmodule = "model.nothing"\n')
    with pytest.raises(InputError, match=r"no tensor for model\.nothing"):
        family_of(Checkpoint.open(tiny_folder), path)
    path.write_text(WRITER + 'role = "embedding"\nmodule = "embed_tokens"\naxis = 1\n')
    with pytest.raises(InputError, match="no row of 'llama' says what layer 0 writes"):
        family_of(Checkpoint.open(tiny_folder), path)


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_an_alias_stands_for_a_hub_id(alias: str) -> None:
    found = located(alias)
    assert isinstance(found, tuple) and found == (ALIASES[alias], None)
    owner, name = found[0].split("/")
    assert owner and name and "@" not in name
