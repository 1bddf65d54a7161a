"""The stand-in hub itself, used by the real huggingface_hub client: what other tests rely on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_client import use_hub
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, ModelCard, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors.torch import save

WEIGHTS = save({"w": torch.arange(40_000, dtype=torch.float32)})
FILES = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "images/a.txt": b"P3"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(server, tmp_path / "home", monkeypatch)
        yield server


def contents(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_committed_is_downloaded_pinned_to_its_commit(hub: HubServer) -> None:
    commit = hub.add("owner/name", FILES)
    hub.add("owner/name", {"config.json": b"{}"})
    folder = snapshot_download("owner/name", revision=commit)
    assert Path(folder).name == commit
    assert contents(folder) == FILES
    assert contents(snapshot_download("owner/name")) == {"config.json": b"{}"}


def test_a_long_tree_comes_in_pages(hub: HubServer) -> None:
    hub.add("owner/name", {f"images/{number:03}.txt": b"x" for number in range(120)})
    assert len(list(HfApi().list_repo_tree("owner/name", recursive=True))) == 120


def test_ranges_of_a_safetensors_file_are_served(hub: HubServer) -> None:
    hub.add("owner/name", FILES, private=True)
    url = hf_hub_url("owner/name", "model.safetensors")
    for asked, expected in (
        ("bytes=0-7", WEIGHTS[:8]),
        ("bytes=8-", WEIGHTS[8:]),
        ("bytes=-5", WEIGHTS[-5:]),
        (f"bytes=10-{len(WEIGHTS) * 2}", WEIGHTS[10:]),
    ):
        answer = get_session().get(url, headers={**build_hf_headers(), "Range": asked})
        assert (answer.status_code, answer.content) == (206, expected)
        assert answer.headers["Content-Range"].endswith(f"/{len(WEIGHTS)}")
    assert get_session().get(url, headers={**build_hf_headers(), "Range": "bytes=99999999-"}).status_code == 416
    head = get_session().head(url, headers=build_hf_headers(), follow_redirects=False)
    assert (head.status_code, head.headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert not any("authorization" in each.headers for each in hub.requests("/storage/"))


def test_a_folder_is_uploaded_as_objects_and_small_files(hub: HubServer, tmp_path: Path) -> None:
    for path, data in FILES.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)
    api = HfApi()
    assert api.whoami()["name"] == hub.user
    api.create_repo("tester/new", private=True)
    made = api.upload_folder(repo_id="tester/new", folder_path=tmp_path / "up", commit_message="first")
    held = hub.repos["tester/new"]
    assert held.private and held.refs["main"] == made.oid and held.messages[-1] == "first"
    assert {path: data for path, data in held.files().items() if path != ".gitattributes"} == FILES
    proposed = api.upload_folder(repo_id="tester/new", folder_path=tmp_path / "up", delete_patterns="*", create_pr=True)
    assert proposed.oid
    assert len(hub.stored) == 1


@pytest.mark.parametrize(
    ("about", "token", "revision", "error"),
    [
        ({"private": True}, "", "main", RepositoryNotFoundError),
        ({"gated": True}, "", "main", GatedRepoError),
        ({}, None, "absent", RevisionNotFoundError),
    ],
)
def test_what_may_not_be_read_is_said_in_the_hubs_terms(
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    about: dict[str, bool],
    token: str | None,
    revision: str,
    error: type[Exception],
) -> None:
    hub.add("owner/name", FILES, **about)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(error):
        snapshot_download("owner/name", revision=revision)


def test_faults_strike_as_often_as_they_are_told(hub: HubServer) -> None:
    hub.faults.append(Fault("GET /api/whoami-v2", 503, times=1, skip=1))
    api = HfApi()
    api.whoami()
    with pytest.raises(HfHubHTTPError, match="503"):
        api.whoami()
    api.whoami()


def test_a_download_that_is_cut_goes_on_where_it_was(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", FILES)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16 * 1024)
    hub.faults.append(Fault("GET /storage/", after=70_000, times=1))
    assert contents(snapshot_download("owner/name"))["model.safetensors"] == WEIGHTS
    first, second = hub.requests("GET /storage/")
    assert "range" not in first.headers and second.headers["range"].startswith("bytes=")


def test_a_connection_can_be_reset(hub: HubServer) -> None:
    hub.faults.append(Fault("GET /api/whoami-v2"))
    with pytest.raises(HTTPError, match="reset"):
        HfApi().whoami()


def test_a_card_is_validated(hub: HubServer) -> None:
    ModelCard("---\nlicense: mit\nbase_model: a/b\n---\n").validate()
    for bad in ("license: [1]", "base_model: no slash", "base_model_relation: copy", "license: other"):
        with pytest.raises(ValueError, match=r"must be|required"):
            ModelCard(f"---\n{bad}\n---\n").validate()
