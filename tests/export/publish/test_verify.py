"""guardfold verify on folders that others made: links, pipes, strange names, and manifests that say anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deadline import within
from published import publish
from zoo import random_basis

from guardfold.export.formats import Formats
from guardfold.export.formats.onnx import Onnx
from guardfold.export.publish.card import extend_card
from guardfold.export.publish.manifest import NEEDED, load_manifest
from guardfold.export.publish.verify import verify
from guardfold.guard.base import untrusted
from guardfold.guard.base.errors import InputError
from guardfold.guard.base.untrusted import printable
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.pipeline import GuardOptions, check_guarded, export_guarded, extract_guard, extract_to


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A guarded folder, beside which lies what its links may lead to."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(b"x")
    return publish(tiny_folder, tmp_path / "guarded")


def change(folder: Path, **parts: Any) -> Path:
    path = folder / "guardfold.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return folder


def refused(folder: Path | str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        verify(str(folder))
    said = str(error.value)
    assert "\n" not in said and said.isprintable()


def move_out(folder: Path, name: str) -> None:
    """`name` lies outside `folder`, and a link in its place."""
    (folder / name).rename(folder.parent / "moved")
    (folder / name).symlink_to(folder.parent / "moved")


ADDED: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("absent"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to the folder above": lambda path: path.symlink_to(".."),
    "a link to a folder in it": lambda path: path.symlink_to("guardfold"),
    "a link out": lambda path: path.symlink_to("../other/file"),
}


@pytest.mark.parametrize("kind", ADDED)
@pytest.mark.parametrize("where", ["zz", "guardfold/zz"])
def test_what_is_no_file_of_the_folder_is_reported_as_added(folder: Path, kind: str, where: str) -> None:
    ADDED[kind](folder / where)
    with within(30):
        assert verify(str(folder)).differences == [f"{where}: added; it was never measured"]


@pytest.mark.parametrize("name", ["model.safetensors", "guardfold/guard.safetensors"])
def test_a_link_out_of_the_folder_is_no_file_that_was_measured(folder: Path, name: str) -> None:
    move_out(folder, name)
    files = json.loads((folder / "guardfold.json").read_text())["files"]
    for recorded in (files[name], "not read"):
        change(folder, files=files | {name: recorded})
        said = [f"{name}: added in place of a file; it is none of this folder's own"]
        assert verify(str(folder)).differences == said


def test_a_folder_that_is_a_link_is_not_entered(folder: Path) -> None:
    (folder / "guardfold").rename(folder.parent / "moved")
    (folder / "guardfold").symlink_to("../moved")
    assert verify(str(folder)).differences == [
        "guardfold/guard.safetensors: missing",
        "guardfold: added; it was never measured",
    ]


def test_a_manifest_outside_the_folder_is_not_read(folder: Path) -> None:
    move_out(folder, "guardfold.json")
    refused(folder, r"guardfold\.json: leads outside the model folder")


def test_a_guard_outside_the_folder_is_not_read(folder: Path) -> None:
    move_out(folder, "guardfold/guard.safetensors")
    with pytest.raises(InputError, match=r"guardfold/guard\.safetensors: leads outside the model folder"):
        check_guarded(folder, "demo", skip_behaviour=True)


def test_the_links_of_the_hubs_cache_are_followed(folder: Path) -> None:
    """snapshots/REVISION -> blobs, at any depth."""
    snapshot, blobs = (folder.parent / "cache" / name for name in ("snapshots/a1", "blobs"))
    blobs.mkdir(parents=True)
    for at, path in enumerate(sorted(each for each in folder.rglob("*") if each.is_file())):
        path.rename(blobs / str(at))
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(at), link.parent))
    assert verify(str(snapshot)).differences == []
    assert Guard.load(snapshot / "guardfold" / "guard.safetensors", snapshot).interventions


def test_a_guard_file_that_is_named_by_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    guard = Guard((SublayerProjection({1: random_basis(1, 32)}),))
    guard.save(tmp_path / "guard.safetensors")
    (tmp_path / "a" / "link.safetensors").symlink_to("../guard.safetensors")
    assert Guard.load(tmp_path / "a" / "link.safetensors").hash == guard.hash


@pytest.mark.parametrize("part", ["source", "figures", "files"])
@pytest.mark.parametrize("value", ["x", 5, None, []])
def test_a_part_of_the_manifest_that_is_no_object_is_refused(folder: Path, part: str, value: object) -> None:
    refused(change(folder, **{part: value}), rf"not a manifest that guardfold wrote \(its {part} is a ")


@pytest.mark.parametrize("verdict", ["\ud800", "safer\nguardfold: all is well", "\x1b[2J", "x" * 300])
def test_a_verdict_that_does_not_print_is_refused(folder: Path, verdict: str) -> None:
    refused(change(folder, verdict=verdict), "not a manifest that guardfold wrote")


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\x1b[2J", "x" * 300, 5, ["\u202e"]])
def test_what_a_manifest_says_of_its_source_is_escaped(folder: Path, text: object) -> None:
    said = str(verify(str(change(folder, source={"model": text, "revision": text}))))
    assert said.isprintable() and len(said) < 600


def test_a_name_that_does_not_print_is_escaped(folder: Path) -> None:
    names = ["a\nb", "\x1b[2J", os.fsdecode(b"\xff"), "é"]
    for name in names:
        (folder / name).touch()
    said = verify(str(folder)).differences
    assert {each.partition(":")[0] for each in said} == {r"a\nb", r"\x1b[2J", r"\udcff", "é"}
    assert all(each.isprintable() for each in said)
    files = json.loads((folder / "guardfold.json").read_text())["files"]
    missing = verify(str(change(folder, files=files | {"\x1b[2J\n": ""}))).differences[0]
    assert missing == r"\x1b[2J\n: missing"


def test_a_text_for_output_is_cut() -> None:
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 200 + "..."


def test_a_manifest_that_would_fill_the_memory_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder, more=[[]] * 2000)
    monkeypatch.setattr(untrusted, "MAX_PARTS", 1000)
    refused(folder, r"guardfold\.json: not sound JSON \(over 1000 values\)")


def test_a_manifest_may_lack_what_is_not_asked_for(folder: Path) -> None:
    manifest = load_manifest(folder)
    del manifest["figures"]
    (folder / "guardfold.json").write_text(json.dumps(manifest))
    assert verify(str(folder)).differences == []
    with pytest.raises(InputError, match=re.escape("(it needs files, verdict, verified, figures)")):
        load_manifest(folder, "figures")


@pytest.mark.parametrize("part", [{"figures": 5}, {"figures": None}, {"source": 5}, {"files": [1]}, None], ids=str)
def test_graphs_are_not_begun_where_the_manifest_cannot_take_them(
    folder: Path, part: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Onnx, "write", lambda *_: pytest.fail("too late"))
    if part:
        change(folder, **part)
    else:
        kept = {name: value for name, value in load_manifest(folder).items() if name in NEEDED}
        (folder / "guardfold.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"guardfold\.json: not a manifest that guardfold wrote"):
        export_guarded(str(folder), folder.parent / "out", formats=Formats("onnx"))
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("card", [None, b"\xff"])
def test_a_card_that_is_missing_or_not_text_is_still_extended(tmp_path: Path, card: bytes | None) -> None:
    if card:
        (tmp_path / "README.md").write_bytes(card)
    (tmp_path / "model.onnx").touch()
    extend_card(tmp_path)
    assert "- `model.onnx`" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_model_folder_whose_name_is_not_utf_8_is_refused_at_once(folder: Path) -> None:
    model, output = str(folder.rename(folder.parent / os.fsdecode(b"b\xff"))), folder.parent / "out"
    runs: tuple[Callable[[], object], ...] = (
        lambda: export_guarded(model, output, skip_behaviour=True),
        lambda: export_guarded(model, output, formats=Formats("onnx")),
        lambda: export_guarded("demo", output, adapter=model, skip_behaviour=True),
        lambda: extract_to(output, model, GuardOptions("projection")),
    )
    for run in runs:
        with pytest.raises(InputError, match=r"^b\\udcff: this name is not UTF-8; rename the folder$"):
            run()
    assert not output.exists()


@pytest.mark.parametrize("name", ["x" * 300, "owner/" + "x" * 300, "x/y/" + "z" * 300])
def test_a_name_that_is_too_long_is_no_folder(name: str) -> None:
    with pytest.raises(InputError, match=r"x{100}|z{100}"):
        verify(name)
    with pytest.raises(InputError, match=r"no guardfold\.json"):
        load_manifest(Path(name))
    with pytest.raises(InputError, match="no such guard file"):
        check_guarded(Path(name), "demo", skip_behaviour=True)
    with pytest.raises(InputError, match="neither a guard file nor a preset"):
        extract_guard("demo", GuardOptions(name))
    for place in (Path(name), Path(name) / "guard.safetensors"):
        with pytest.raises(InputError, match=r"no such folder|cannot be written"):
            extract_to(place, "demo", GuardOptions("projection"))
