"""Inspecting a model on the hub: config and headers come over the wire, weights do not."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hub_server import Fault, HubServer
from published import publish

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import family_of
from guardfold.guard.base.errors import InputError
from guardfold.pipeline import inspect_model, trace_family

REPO = "owner/model"
OLD_BUFFER = b"language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
"""What old checkpoints have and transformers passes by."""


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return publish(tiny_folder, tmp_path / "model", shards=3)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bytes_asked(hub: HubServer) -> int:
    """Of files of weights, all requests together; each must ask for a range."""
    ranges = [each.headers["range"] for each in hub.requests(r"^GET .*(\.safetensors($|\?)|/objects/)")]
    ends = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for asked in ranges]
    return sum(last + 1 - first for first, last in ends)


def test_a_hub_id_is_inspected_as_the_folder_is_and_no_weights_are_read(hub: HubServer, folder: Path) -> None:
    hub.add(REPO, files_of(folder))
    checkpoint, family = inspect_model(REPO)
    here = Checkpoint.open(folder)
    assert family == family_of(here)
    assert checkpoint.shapes == here.shapes and checkpoint.data_bytes == here.data_bytes
    headers = sum(8 + len(shard.header) for shard in here.shards)
    assert headers <= bytes_asked(hub) <= 2 * headers  # a redirect to the objects' origin is asked as well


def test_the_size_of_the_weights_does_not_matter(hub: HubServer, folder: Path) -> None:
    name, index = "model-00001-of-00003.safetensors", "model.safetensors.index.json"
    found = []
    for more in (2**10, 2**24):
        grown = files_of(folder)
        grown[name] = padded(grown[name], more)
        entry = b'"weight_map": {"%s": "%s", ' % (OLD_BUFFER, name.encode())
        grown[index] = grown[index].replace(b'"weight_map": {', entry)
        hub.add(f"owner/model{more}", grown)
        before = bytes_asked(hub)
        found.append((inspect_model(f"owner/model{more}")[0].data_bytes, bytes_asked(hub) - before))
    (small, asked_small), (large, asked_large) = found
    assert large - small == 4 * (2**24 - 2**10) and abs(asked_large - asked_small) < 100


def padded(data: bytes, count: int) -> bytes:
    """The safetensors file `data` with one more tensor, `count` float32 zeros."""
    length = struct.unpack("<Q", data[:8])[0]
    header, held = data[8 : 8 + length].rstrip(), data[8 + length :]
    place = (OLD_BUFFER, count, len(held), len(held) + 4 * count)
    entry = b',"%s":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}}' % place
    header = header[:-1] + entry
    return struct.pack("<Q", len(header)) + header + held + bytes(4 * count)


def test_a_revision_is_inspected_and_traced(hub: HubServer, folder: Path) -> None:
    hub.add(REPO, files_of(folder), branch="other")
    hub.add(REPO, {"config.json": b"{}"})
    with pytest.raises(InputError):
        inspect_model(REPO)
    assert inspect_model(f"{REPO}@other")[1].model_type == "llava"
    assert 'module = "model.multi_modal_projector.linear_2"' in trace_family(f"{REPO}@other")


def lying_header(data: bytes) -> bytes:
    return struct.pack("<Q", 2**40) + data[8:]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model-00002-of-00003.safetensors": lying_header}, "not a safetensors file"),
        ({"model-00002-of-00003.safetensors": lambda data: data[:4]}, "not a safetensors file"),
        ({"model-00002-of-00003.safetensors": lambda data: data + b"more"}, "bytes long, its header describes"),
        ({"model.safetensors.index.json": lambda _data: b"[]"}, "not a JSON object"),
        ({"config.json": lambda _data: b"{"}, "not JSON|not sound JSON"),
        ({"model-00002-of-00003.safetensors": None}, "no such file there"),
    ],
    ids=["header too long", "no header", "longer than its header says", "index", "config", "shard missing"],
)
def test_what_is_not_sound_there_is_one_line(hub: HubServer, folder: Path, change: dict, complaint: str) -> None:
    files = files_of(folder)
    for name, how in change.items():
        data = files.pop(name)
        if how:
            files[name] = how(data)
    hub.add(REPO, files)
    with pytest.raises(InputError, match=complaint) as caught:
        inspect_model(REPO)
    assert "\n" not in str(caught.value) and hub.token not in str(caught.value)


def test_a_passing_failure_is_tried_again_and_a_missing_repository_said(hub: HubServer, folder: Path) -> None:
    hub.add(REPO, files_of(folder))
    hub.faults.append(Fault(r"GET .*\.safetensors", status=503, times=2))
    assert inspect_model(REPO)[1].layers == 3
    with pytest.raises(InputError, match="no such repository"):
        inspect_model("owner/nothing")
