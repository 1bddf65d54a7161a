"""A format of the caller's own needs its class and its registration, nothing else: it is written, examined, described,
found again and refused like those that are built in.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from zoo import random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats import FORMATS, Formats, formats_in, register_format
from guardfold.export.formats.base import Format, FormatRequest, Job, Notes
from guardfold.export.formats.safetensors import Safetensors
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import ResidualProjection, SublayerProjection
from guardfold.pipeline import GuardOptions, NotSafer, check_guarded, export_guarded
from guardfold.pipeline.examining import vouched
from guardfold.pipeline.writing import Artefact
from guardfold.validators.behaviour import making

GUARD = Guard((SublayerProjection({1: random_basis(1, 32)}),))


@dataclass(frozen=True)
class Bundle(Format):
    """All files of the guarded weights in one archive."""

    name = "bundle"
    parts = "bundles"
    library = "tarfile"
    bundle_name: str = "bundle"

    def check(self, ask: FormatRequest) -> None:
        super().check(ask)
        if "/" in self.bundle_name:
            raise InputError(f"--set bundle_name={self.bundle_name}: a name, not a path")

    def write(self, job: Job) -> None:
        unpacked = job.aside / "to pack"
        unpacked.mkdir()
        Safetensors().write(Job(job.model, job.held, unpacked, job.weights, job.aside))
        with tarfile.open(job.place / f"{self.bundle_name}.tar", "w") as archive:
            archive.add(unpacked, ".")

    def open(self, job: Job) -> Checkpoint:
        (packed,) = job.place.glob("*.tar")
        unpacked = job.aside / "unpacked"
        with tarfile.open(packed) as archive:
            archive.extractall(unpacked, filter="data")
        return Checkpoint.open(unpacked)

    def notes(self, job: Job) -> Notes:
        return Notes(
            "folded into the weights of a bundle", entries={"bundle": self.bundle_name}, again="--format bundle"
        )

    @classmethod
    def found(cls, folder: Path) -> bool:
        return any(folder.glob("*.tar"))

    @classmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        return ["## Unpack it", f"With tar; it was made from {names['source']}."]


@dataclass(frozen=True)
class Listing(Format):
    """The names of the guarded tensors: made of weights, and run by nothing."""

    name = "listing"
    derived = True

    def write(self, job: Job) -> None:
        (job.place / "tensors.list").write_text("\n".join(sorted(job.weights.tensors)))

    def open(self, job: Job) -> None:
        return None

    @classmethod
    def found(cls, folder: Path) -> bool:
        return (folder / "tensors.list").is_file()

    @classmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        return ["## Read its listing"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for cls in (Bundle, Listing):
        assert register_format(cls) is cls
    yield
    for cls in (Bundle, Listing):
        del FORMATS[cls.name]


@pytest.fixture
def guard(tmp_path: Path) -> str:
    GUARD.save(tmp_path / "guard.safetensors")
    return str(tmp_path / "guard.safetensors")


def test_it_is_written_examined_described_and_found_again(tiny_folder: Path, tmp_path: Path, guard: str) -> None:
    formats = Formats("bundle", more={"bundle_name": "all"})
    made = export_guarded(str(tiny_folder), tmp_path / "out", GuardOptions(guard), formats, skip_behaviour=True)
    assert made.evidence.sound and made.evidence.equivalence.folded <= 1e-5 < made.evidence.equivalence.edit
    assert {path.name for path in made.folder.iterdir()} == {
        *("all.tar", "guardfold", "guardfold.json", "README.md", "report.html", "report.json")
    }
    manifest = json.loads((made.folder / "guardfold.json").read_text())
    assert manifest["bundle"] == "all" and "all.tar" in manifest["files"]
    card = (made.folder / "README.md").read_text()
    for said in ("library_name: tarfile", "folded into the weights of a bundle", "## Unpack it", "--format bundle"):
        assert said in card
    assert "## Load it" not in card
    assert formats_in(made.folder) == [Bundle]
    assert check_guarded(made.folder, str(tiny_folder), skip_behaviour=True).sound


def test_what_is_not_as_folded_is_not_published(
    tiny_folder: Path, tmp_path: Path, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bundle.open

    def other(self: Bundle, job: Job) -> Checkpoint:
        opened = whole(self, job)
        path = opened.folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return Checkpoint.open(opened.folder)

    monkeypatch.setattr(Bundle, "open", other)
    with pytest.raises(NotSafer, match="should be untouched but differs"):
        export_guarded(str(tiny_folder), tmp_path / "out", GuardOptions(guard), Formats("bundle"), skip_behaviour=True)
    assert not (tmp_path / "out").exists()


def test_what_is_made_of_weights_leaves_none_and_is_not_vouched_for_unseen(
    tiny_folder: Path, tmp_path: Path, guard: str
) -> None:
    out = tmp_path / "out"
    made = export_guarded(str(tiny_folder), out, GuardOptions(guard), Formats("listing"), skip_behaviour=True)
    assert made.evidence.sound
    seen, unseen = (Artefact(Listing(), cast(Any, None), opened) for opened in (object(), None))
    assert vouched([seen], made.evidence) and not vouched([seen, unseen], made.evidence)
    assert not (out / "model.safetensors").exists()
    names = (out / "tensors.list").read_text().splitlines()
    assert names == sorted(Checkpoint.open(tiny_folder).tensors)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_guarded_folder_is_given_in_it(tiny_folder: Path, tmp_path: Path, guard: str) -> None:
    first = export_guarded(str(tiny_folder), tmp_path / "out", GuardOptions(guard), skip_behaviour=True)
    made = export_guarded(str(first.folder), tmp_path / "more", formats=Formats("listing,safetensors"))
    assert {"tensors.list", "model.safetensors"} <= {path.name for path in made.folder.iterdir()}
    assert "## Read its listing" in (made.folder / "README.md").read_text()
    assert (made.folder / "model.safetensors").read_bytes() == (first.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "formats", "said"),
    [
        (GuardOptions("projection", scope="residual"), {"names": "bundle"}, "residual-projection: weights cannot hold"),
        (GuardOptions("projection", scope="residual"), {"names": "safetensors"}, "residual-projection: weights cannot"),
        (
            GuardOptions("projection", scope="residual"),
            {"names": "lora"},
            "preset projection has a residual-projection",
        ),
        (GuardOptions("auto"), {"names": "lora"}, "the preset auto has a gate: adds neurons"),
        (GuardOptions("gate"), {"names": "bundle", "more": {"bundle_name": "../a"}}, "a name, not a path"),
        (
            GuardOptions("projection", scope="residual"),
            {"names": "onnx", "skip_runtime": True},
            "--skip-runtime: this guard is in the graphs alone",
        ),
        (GuardOptions("gate"), {"names": "safetensors,onnx", "onnx_weights": "shared", "onnx_dtype": "q8"}, "use copy"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_any_model_is_run(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: GuardOptions,
    formats: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(making, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=said):
        export_guarded(str(tiny_folder), tmp_path / "out", options, Formats(**formats))
    assert not (tmp_path / "out").exists()


def test_a_guard_file_that_does_not_fit_is_refused_before_anything_is_made(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guardfold.pipeline.exporting.staging", lambda *_: pytest.fail("staged"))
    for guard, said in (
        (Guard((ResidualProjection({0: random_basis(1, 32)}),)), "weights cannot hold it"),
        (Guard((SublayerProjection({99: random_basis(1, 32)}),)), "acts on layer 99"),
        (Guard((SublayerProjection({1: torch.eye(48)[:1]}),)), "the model's hidden size is 32"),
    ):
        guard.save(tmp_path / "guard.safetensors")
        with pytest.raises(InputError, match=said):
            export_guarded(str(tiny_folder), tmp_path / "out", GuardOptions(str(tmp_path / "guard.safetensors")))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"names": "bundles"}, "--format 'bundles': one of safetensors, onnx, lora, bundle, listing"),
        ({"names": "lora,bundle"}, "an adapter is for the unmodified model"),
        ({"more": {"bundle_size": 1}}, "--set bundle_size: no format has such a setting"),
        ({"more": {"writing": 1}}, "--set writing: no format has such a setting, or it has an option of its own"),
        ({"names": "bundle", "onnx_dtype": "int3"}, "--onnx-dtype 'int3'"),
    ],
)
def test_settings_that_no_format_takes_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Formats(**given)


def test_a_name_is_given_once() -> None:
    @dataclass(frozen=True)
    class Other(Listing):
        name = "onnx"

    with pytest.raises(InputError, match="onnx: a format of this name is known already, Onnx"):
        register_format(Other)
    assert register_format(Bundle) is Bundle
