"""A folder of safetensors is untrusted: whatever a header, an index or a link says wrong is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import CONFIG, GOOD, Entries, container, entries, entry, folder_with, json_values, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from zoo import Tiny, tensors

from guardfold.export.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Checkpoint
from guardfold.guard.base.errors import InputError


def test_a_sound_file_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    held = {
        "a": torch.randn(5, 3),
        "b.weight": torch.randn(4).to(torch.bfloat16),
        "c": torch.tensor(7),
        "d": torch.randn(2, 2, 2).half(),
        "e": torch.ones(0, 3),
        "f": torch.tensor([True, False]),
    }
    folder = folder_with(tmp_path / "model")
    save_file(held, folder / SINGLE_FILE, {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(held)
    for name, tensor in held.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype
    assert torch.equal(checkpoint.read("a", 1, 4), held["a"][1:4])
    assert checkpoint.shards[0].metadata == {"format": "pt"}
    assert checkpoint.data_bytes == sum(tensor.nbytes for tensor in held.values())


def test_the_shards_are_read_as_one(tmp_path: Path) -> None:
    folder = Tiny().save(tmp_path / "model", max_shard_size="20KB", processor=False)
    checkpoint, held = Checkpoint.open(folder), tensors(folder)
    assert len(checkpoint.shards) > 3
    assert set(checkpoint.tensors) == set(held)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in held.items())


def with_a(**changes: Any) -> bytes:
    return container({**GOOD, "a": {**GOOD["a"], **changes}})


def renamed(name: str) -> bytes:
    return container({name if key == "a" else key: value for key, value in GOOD.items()})


HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "not a safetensors file"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "longer than the file": (container(GOOD, length=10_000), "header of 10000 bytes in a file of"),
    "longer than the limit": (container(GOOD, length=2**40), "not a safetensors file"),
    "longest number": (container(GOOD, length=2**64 - 1), "not a safetensors file"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "not a safetensors file"),
    "not JSON": (container(b"{oops"), "not sound JSON"),
    "not UTF-8": (container(b'{"\xff": 1}'), "not sound JSON"),
    "too deep": (container(b'{"a":' * 100_000), "not sound JSON"),
    "a number too long": (container(b'{"a": ' + b"9" * 5000 + b"}"), "not sound JSON"),
    "not an object": (container(b"[]"), "not a JSON object"),
    "the same tensor twice": (container(json.dumps(GOOD)[:-1].encode() + b', "a": 1}'), "a key appears twice"),
    "the same key twice inside": (
        container(b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}', size=8),
        "a key appears twice",
    ),
    "metadata not text": (container({**GOOD, "__metadata__": {"format": 1}}), "__metadata__ is not an object of str"),
    "metadata a list": (container({**GOOD, "__metadata__": []}), "__metadata__ is not an object of strings"),
    "entry not an object": (container({**GOOD, "a": 7}), "tensor 'a': needs dtype, shape and data_offsets"),
    "no shape": (container({**GOOD, "a": {"dtype": "F32", "data_offsets": [0, 24]}}), "tensor 'a': needs dtype"),
    "one key more": (with_a(device="cpu"), "tensor 'a': needs dtype, shape and data_offsets"),
    "unknown dtype": (with_a(dtype="F4"), "tensor 'a': unknown dtype 'F4'"),
    "dtype not text": (with_a(dtype=["F32"]), r"tensor 'a': unknown dtype \['F32'\]"),
    "negative shape": (with_a(shape=[-2, -3]), "tensor 'a': bad shape"),
    "absurd shape": (with_a(shape=[2**63, 3]), "tensor 'a': bad shape"),
    "shape that overflows": (with_a(shape=[2**32, 2**32]), "tensor 'a': 24 bytes do not hold F32"),
    "fractional shape": (with_a(shape=[2.0, 3]), "tensor 'a': bad shape"),
    "shape of truths": (with_a(shape=[True, 6]), "tensor 'a': bad shape"),
    "shape not a list": (with_a(shape="6"), "tensor 'a': bad shape"),
    "too many axes": (with_a(shape=[1] * 50 + [6]), "tensor 'a': bad shape"),
    "negative offset": (with_a(data_offsets=[-24, 0]), "tensor 'a': bad data_offsets"),
    "one offset": (with_a(data_offsets=[24]), "tensor 'a': bad data_offsets"),
    "absurd offsets": (with_a(data_offsets=[2**62, 2**62 + 24]), "tensor 'a': bad data_offsets"),
    "backwards": (with_a(data_offsets=[24, 0]), "tensor 'a': -24 bytes do not hold"),
    "size too small": (with_a(shape=[2, 4]), r"tensor 'a': 24 bytes do not hold F32 of shape \[2, 4\]"),
    "size too large": (with_a(shape=[5]), "tensor 'a': 24 bytes do not hold F32"),
    "overlap": (container({**GOOD, "b": entry("BF16", [4], 20, 28)}), "tensor 'b' overlaps another or leaves a gap"),
    "the same bytes twice": (container({**GOOD, "b": entry("F32", [6], 0, 24)}), "overlaps another or leaves a gap"),
    "gap": (container({**GOOD, "c": entry("I64", [], 33, 41)}, size=41), "tensor 'c' overlaps another or leaves a gap"),
    "hole in front": (container({"a": entry("F32", [1], 4, 8)}, size=8), "leaves a gap at byte 0"),
    "file too short": (container(GOOD, size=39), "bytes long, its header describes"),
    "file too long": (container(GOOD, size=41), "bytes long, its header describes"),
    "name with a path": (renamed("../a"), "not a tensor name"),
    "name with a backslash": (renamed("a\\b"), "not a tensor name"),
    "name with a newline": (renamed("a\nb"), "not a tensor name"),
    "name with an escape": (renamed("a\x1b[31m"), "not a tensor name"),
    "name with a half character": (container(json.dumps(GOOD).replace('"a"', '"\\ud800"').encode()), "not a tensor"),
    "empty name": (renamed(""), "not a tensor name"),
}


def test_the_file_that_the_broken_ones_are_made_from_is_sound(tmp_path: Path) -> None:
    assert set(Checkpoint.open(folder_with(tmp_path, container(GOOD))).tensors) == set(GOOD)


@pytest.mark.parametrize("kind", HEADERS)
def test_a_broken_file_is_refused(tmp_path: Path, kind: str) -> None:
    shard, says = HEADERS[kind]
    refused(folder_with(tmp_path, shard), SINGLE_FILE, says)


@given(header=st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4), size=st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_any_header_is_either_sound_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: Entries, size: int
) -> None:
    sound_or_refused(folder_with(tmp_path_factory.mktemp("fuzz"), container(header, size)))


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_sound_file_leaves_it_sound_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shard = bytearray(container(GOOD))
    for place in data.draw(st.lists(st.integers(0, len(shard) - 1), min_size=1, max_size=4)):
        shard[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(shard)) | st.just(len(shard)))
    sound_or_refused(folder_with(tmp_path_factory.mktemp("fuzz"), bytes(shard[:cut])))


def sound_or_refused(folder: Path) -> None:
    said = ""
    try:
        checkpoint = Checkpoint.open(folder)
    except InputError as error:
        said = str(error)
    if said:
        assert SINGLE_FILE in said
        assert "\n" not in said
        return
    held = sum(checkpoint.read(name).nbytes for name in checkpoint.tensors)
    shard = checkpoint.shards[0]
    assert shard.data_start + held == shard.path.stat().st_size


def sharded(path: Path) -> tuple[Path, dict[str, Any]]:
    """Two shards, `a` and `b` in the first and `c` in the second, with the index that belongs to them."""
    folder = folder_with(path)
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.ones(4)}, folder / "two.safetensors")
    where = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    return folder, {"metadata": {"total_size": 36}, "weight_map": where}


def twice(folder: Path, index: dict[str, Any]) -> None:
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, folder / "two.safetensors")


def both_listed(folder: Path, index: dict[str, Any]) -> str:
    twice(folder, index)
    return json.dumps(index).replace('"c":', '"a": "two.safetensors", "c":')


INDICES: dict[str, tuple[Callable[[Path, dict[str, Any]], object], str, str]] = {
    "not JSON": (lambda folder, index: "{oops", INDEX_FILE, "not sound JSON"),
    "too deep": (lambda folder, index: "[" * 100_000, INDEX_FILE, "not sound JSON"),
    "not an object": (lambda folder, index: "[]", INDEX_FILE, "not a JSON object"),
    "no map": (lambda folder, index: index.pop("weight_map"), INDEX_FILE, "no weight_map"),
    "empty map": (lambda folder, index: index["weight_map"].clear(), INDEX_FILE, "no weight_map"),
    "map a list": (lambda folder, index: index.update(weight_map=["a"]), INDEX_FILE, "no weight_map"),
    "file not text": (lambda folder, index: index["weight_map"].update(a=1), INDEX_FILE, "tensor 'a' is in 1"),
    "file above": (
        lambda folder, index: index["weight_map"].update(a="../one.safetensors"),
        INDEX_FILE,
        "tensor 'a' is in '../one.safetensors', which is not a file of this folder",
    ),
    "file elsewhere": (
        lambda folder, index: index["weight_map"].update(a=str(folder.parent / "one.safetensors")),
        INDEX_FILE,
        "which is not a file of this folder",
    ),
    "a pickle": (
        lambda folder, index: index["weight_map"].update(a="one.bin"),
        INDEX_FILE,
        "not a file of this folder",
    ),
    "a key twice": (both_listed, INDEX_FILE, "a key appears twice"),
    "a shard missing": (
        lambda folder, index: (folder / "two.safetensors").unlink(),
        "two.safetensors",
        "no such file",
    ),
    "a tensor missing": (
        lambda folder, index: index["weight_map"].update(d="two.safetensors"),
        INDEX_FILE,
        r"tensor 'd' is not in two\.safetensors",
    ),
    "a tensor elsewhere": (
        lambda folder, index: index["weight_map"].update(a="two.safetensors"),
        INDEX_FILE,
        r"tensor 'a' is not in two\.safetensors",
    ),
    "a tensor not listed": (
        lambda folder, index: index.update(weight_map={k: v for k, v in index["weight_map"].items() if k != "b"}),
        "one.safetensors",
        "tensor 'b' is not in the index",
    ),
    "a tensor in two shards": (twice, "two.safetensors", "tensor 'a' is not in the index there"),
}


def test_the_index_that_the_broken_ones_are_made_from_is_sound(tmp_path: Path) -> None:
    folder, index = sharded(tmp_path / "model")
    (folder / INDEX_FILE).write_text(json.dumps(index))
    assert set(Checkpoint.open(folder).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize("kind", INDICES)
def test_a_broken_index_is_refused(tmp_path: Path, kind: str) -> None:
    change, names, says = INDICES[kind]
    folder, index = sharded(tmp_path / "model")
    changed = change(folder, index)
    (folder / INDEX_FILE).write_text(changed if isinstance(changed, str) else json.dumps(index))
    refused(folder, names, says)


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(container(GOOD))
    folder = folder_with(tmp_path / "model")
    (folder / SINGLE_FILE).symlink_to(tmp_path / "secret")
    refused(folder, SINGLE_FILE, "leads outside the model folder")


def test_an_index_may_not_leave_the_folder_nor_may_its_shards(tmp_path: Path) -> None:
    folder, index = sharded(tmp_path / "model")
    (tmp_path / "index.json").write_text(json.dumps(index))
    (folder / INDEX_FILE).symlink_to(tmp_path / "index.json")
    refused(folder, INDEX_FILE, "leads outside the model folder")
    (folder / INDEX_FILE).unlink()
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "two.safetensors").rename(tmp_path / "two.safetensors")
    (folder / "two.safetensors").symlink_to(tmp_path / "two.safetensors")
    refused(folder, "two.safetensors", "leads outside the model folder")


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model")
    (folder / "held").write_bytes(container(GOOD))
    (folder / SINGLE_FILE).symlink_to("held")
    assert set(Checkpoint.open(folder).tensors) == set(GOOD)


def hub_cache(root: Path) -> Path:
    """The hub's own layout: links in snapshots/REVISION to files in blobs."""
    blobs, snapshot = root / "models--owner--name" / "blobs", root / "models--owner--name" / "snapshots" / "f00d"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "c0ffee").write_text(CONFIG)
    (blobs / "beef").write_bytes(container(GOOD))
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/beef")
    return snapshot


def test_the_hubs_cache_is_read_and_no_further_than_its_blobs(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    checkpoint = Checkpoint.open(snapshot)
    assert checkpoint.read("a").shape == (2, 3)
    (tmp_path / "models--owner--name" / "secret").write_bytes(container(GOOD))
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to("../../secret")
    refused(snapshot, SINGLE_FILE, "leads outside the model folder")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "two.safetensors"])
def test_what_is_not_a_regular_file_is_refused_without_waiting_for_it(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    folder, index = sharded(tmp_path / "model")
    if name == "two.safetensors":
        (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    refused(folder, name, "not a regular file")


CONFIGS: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{oops", "not sound JSON"),
    "not UTF-8": (b"\xff", "not sound JSON"),
    "too deep": (b"[" * 100_000, "not sound JSON"),
    "not an object": (b"[1]", "not a JSON object"),
    "huge": (b" " * (16 * 2**20 + 1), "larger than"),
    "no type": (b"{}", "model_type None is not a vision-language model"),
    "a text model": (b'{"model_type": "llama"}', "model_type 'llama' is not a vision-language model"),
    "a type that is no text": (b'{"model_type": 5}', "model_type 5 is not a vision-language model"),
    "a type that is a list": (b'{"model_type": ["llava"]}', "is not a vision-language model"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_config_is_refused(tmp_path: Path, kind: str) -> None:
    config, says = CONFIGS[kind]
    folder = folder_with(tmp_path, container(GOOD))
    (folder / "config.json").write_bytes(config)
    refused(folder, str(folder), says)


@pytest.mark.parametrize(
    ("make", "says"),
    [(os.mkfifo, "not a regular file"), (os.mkdir, "not a regular file"), (lambda path: None, "no config")],
    ids=["pipe", "folder", "nothing"],
)
def test_a_config_that_is_no_file_is_refused(tmp_path: Path, make: Callable[[Path], None], says: str) -> None:
    folder = folder_with(tmp_path, container(GOOD))
    (folder / "config.json").unlink()
    make(folder / "config.json")
    refused(folder, "config.json", says)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], r"no \*\.safetensors weights"),
        (["pytorch_model.bin"], r"only pickled weights \(\.bin/\.pt\), which are not opened; convert them first"),
        (["consolidated.00.pth"], "only pickled weights"),
        (["adapter_model.safetensors"], "neither model.safetensors nor"),
    ],
)
def test_a_folder_without_usable_weights_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    folder = folder_with(tmp_path)
    for name in names:
        (folder / name).write_bytes(b"\x80\x04.")
    refused(folder, str(folder), says)


def test_a_file_cut_short_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, container(GOOD))
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / SINGLE_FILE, (folder / SINGLE_FILE).stat().st_size - 20)
    with pytest.raises(InputError, match=r"model\.safetensors: ends at byte .* cut short"):
        checkpoint.read("b")
