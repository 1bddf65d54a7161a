"""Publishing on a hub and pulling from it: what arrives, what is refused, what a bad network does, where tokens go."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import ModelCard
from published import publish
from zoo import flip, random_basis, tensors

from guardfold import cli
from guardfold.export.publish.hub import Target, push
from guardfold.export.publish.verify import verify
from guardfold.guard.base.errors import InputError, Refused
from guardfold.guard.base.hub import DOWNLOAD_ATTEMPTS, download
from guardfold.guard.base.untrusted import MAX_PARTS
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.model.vlm import load, resolve
from guardfold.pipeline import Export, GuardOptions, export_guarded

REPO = "tester/guarded"


@pytest.fixture(scope="module")
def made(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tiny_folder, tmp_path_factory.mktemp("made") / "guarded", shards=3)


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "guarded"))


@pytest.fixture
def weaker(tiny_folder: Path, tmp_path: Path) -> Path:
    return publish(tiny_folder, tmp_path / "weaker", "not safer")


def pushed(hub: HubServer, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    files = hub.repos[repo].files(revision)
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["guardfold", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_what_is_pushed_is_what_is_pulled_verified_and_loaded(hub: HubServer, folder: Path, tiny_folder: Path) -> None:
    url = push(folder, Target(REPO, private=True))
    assert url == f"{hub.endpoint}/{REPO}/commit/{hub.repos[REPO].refs['main']}"
    assert pushed(hub) == contents(folder)
    assert hub.repos[REPO].private
    found = verify(REPO)
    assert found.differences == []
    assert found.folder.name == hub.repos[REPO].refs["main"]
    loaded, original = load(found.folder, "cpu", torch.float32), load(tiny_folder, "cpu", torch.float32)
    for (name, one), other in zip(loaded.model.named_parameters(), original.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_commit_says_the_verdict_and_the_card_has_the_hubs_keys(
    hub: HubServer, tiny_folder: Path, tmp_path: Path
) -> None:
    push(publish(tiny_folder, tmp_path / "guarded", source="owner/base"), Target(REPO))
    assert hub.repos[REPO].messages[-1].startswith("guardfold ") and "safer" in hub.repos[REPO].messages[-1]
    data = ModelCard(pushed(hub)["README.md"].decode()).data.to_dict()
    assert {"guardfold", "vlm-guard"} <= set(data["tags"])
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "finetune")
    assert data["pipeline_tag"] == "image-text-to-text"


def test_a_second_push_leaves_no_weights_of_the_first_and_sends_nothing_twice(
    hub: HubServer, folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    push(folder, Target(REPO))
    push(folder, Target(REPO))
    single = publish(tiny_folder, tmp_path / "single")
    push(single, Target(REPO))
    assert pushed(hub) == contents(single)
    assert verify(REPO).differences == []
    assert len(hub.stored) == len(set(hub.stored))


def test_a_branch_is_made_and_a_change_proposed(hub: HubServer, folder: Path) -> None:
    push(folder, Target(REPO, revision="v2/guarded"))
    assert pushed(hub) == {}
    assert pushed(hub, revision="v2/guarded") == contents(folder)
    hub.add("someone/model", {"config.json": b"{}"})
    url = push(folder, Target("someone/model", create_pr=True))
    assert url == f"{hub.endpoint}/someone/model/discussions/1"
    assert set(contents(folder)) <= set(pushed(hub, "someone/model", "refs/pr/1"))
    assert pushed(hub, "someone/model") == {"config.json": b"{}"}
    with pytest.raises(InputError, match="leave --revision out"):
        push(folder, Target(REPO, create_pr=True, revision="v2"))


def test_what_is_not_safer_is_pushed_only_when_told_to_and_says_so(hub: HubServer, weaker: Path) -> None:
    with pytest.raises(Refused, match="verdict 'not safer', NOT VERIFIED; nothing was pushed"):
        push(weaker, Target(REPO))
    assert not hub.seen
    push(weaker, Target(REPO), allow_weaker=True)
    body = pushed(hub)["README.md"].decode().split("---\n", 2)[2].strip().splitlines()
    assert body[2].startswith("**NOT VERIFIED.**")


def add(folder: Path) -> None:
    (folder / "extra.safetensors").write_bytes(b"x")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder: flip(folder / "model-00001-of-00003.safetensors"), "model-00001-of-00003.safetensors: differs"),
        (lambda folder: flip(folder / "README.md"), "README.md: differs"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
        (add, "extra.safetensors: added; it was never measured"),
    ],
    ids=["flipped", "card", "missing", "added"],
)
def test_files_that_were_not_measured_are_neither_pushed_nor_verified(
    hub: HubServer,
    folder: Path,
    harm: Callable[[Path], None],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(folder)
    with pytest.raises(Refused, match=f"1 files are not as measured, {says}"):
        push(folder, Target(REPO))
    assert not hub.seen
    assert run(monkeypatch, "verify", folder) == 3
    assert capsys.readouterr().err.splitlines() == [f"guardfold: refused: {folder / says}"]


LEFT: dict[str, tuple[str, ...]] = {
    "an upload's notes": (".cache/huggingface/upload/model.safetensors.metadata", ".cache/huggingface/.gitignore"),
    "a download's notes": (".cache/huggingface/download/a.lock", ".cache/huggingface/CACHEDIR.TAG"),
    "a file of that name": (".cache",),
    "a checkout": (".git/config", ".git/objects/aa/bb"),
    "a submodule": (".git",),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_git_and_the_hubs_client_leave_is_neither_verified_nor_pushed(
    hub: HubServer, folder: Path, kind: str
) -> None:
    measured = contents(folder)
    for name in LEFT[kind]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left")
    assert verify(str(folder)).differences == []
    push(folder, Target(REPO))
    assert pushed(hub) == measured and verify(REPO).differences == []


@pytest.mark.parametrize(
    "name", [".cachet", "guardfold/.cache/huggingface/a", ".github/workflows/a.yml", "a/.git/config"]
)
def test_what_is_only_called_alike_is_seen_as_added(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("added")
    assert verify(str(folder)).differences == [f"{name}: added; it was never measured"]


def test_a_flipped_byte_in_a_repository_is_found(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(folder, Target(REPO))
    good = hub.repos[REPO].refs["main"]
    held = pushed(hub)
    data = bytearray(held["model-00002-of-00003.safetensors"])
    data[-1] ^= 1
    hub.add(REPO, {**held, "model-00002-of-00003.safetensors": bytes(data)})
    assert run(monkeypatch, "verify", REPO) == 3
    assert run(monkeypatch, "verify", f"{REPO}@{good}") == 0


def test_an_export_is_pushed_when_it_is_done_and_asked_for_a_token_before(
    hub: HubServer, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, output = tmp_path / "guard.safetensors", tmp_path / "out"
    Guard((SublayerProjection({1: random_basis(1, 32)}),)).save(guard)

    def export(**more: Any) -> Export:
        options = GuardOptions(guard=str(guard))
        target = Target(REPO, private=True)
        return export_guarded(str(tiny_folder), output, options, skip_behaviour=True, push_to=target, **more)

    with pytest.raises(InputError, match="what was not measured is not pushed"):
        export()
    with monkeypatch.context() as without:
        without.delenv("HF_TOKEN")
        with pytest.raises(InputError, match="no token to push with"):
            export(allow_weaker=True)
    assert not hub.seen and not output.exists()
    made = export(allow_weaker=True)
    assert made.url == f"{hub.endpoint}/{REPO}/commit/{hub.repos[REPO].refs['main']}"
    assert pushed(hub) == contents(output)


def test_private_is_not_promised_where_it_does_not_hold(hub: HubServer, folder: Path) -> None:
    hub.add(REPO, {})
    with pytest.raises(InputError, match="exists and is public"):
        push(folder, Target(REPO, private=True))
    assert pushed(hub) == {}


STEPS = {
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST .*/preupload/",
    "batch": "POST .*/objects/batch",
    "put": "PUT /storage/",
    "commit": "POST .*/commit/",
}
ANSWERS = {401: "token is missing or not valid", 403: "write access", 409: "try again", 429: "later", 500: "later"}
SOME = ("create", "commit")


@pytest.mark.parametrize(
    ("step", "status"), [(step, status) for step in STEPS for status in ANSWERS if step in SOME or status == 500]
)
def test_whatever_the_hub_answers_is_one_line_without_the_token(
    hub: HubServer,
    folder: Path,
    step: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo = json.dumps({"error": f"no: {hub.token}", "errors": [{"message": hub.token}]})
    hub.faults.append(Fault(STEPS[step], status, body=echo, headers={"X-Error-Message": f"Bearer {hub.token}"}))
    ends = run(monkeypatch, "push", folder, REPO, "--debug")
    said = capsys.readouterr()
    assert ends == 2
    assert ANSWERS[status] in said.err.splitlines()[-1]
    assert said.err.splitlines()[-1].startswith(f"guardfold: error: {REPO}: cannot be pushed to (")
    assert hub.token not in said.out + said.err


@pytest.mark.parametrize(("step", "status"), [*((step, 503) for step in STEPS), ("commit", 429), ("put", None)])
def test_what_passes_is_tried_again(hub: HubServer, folder: Path, step: str, status: int | None) -> None:
    hub.faults.append(Fault(STEPS[step], status, times=DOWNLOAD_ATTEMPTS - 1))
    push(folder, Target(REPO))
    assert pushed(hub) == contents(folder)


def test_without_a_token_nothing_is_sent(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token to push with; run `hf auth login` or set HF_TOKEN"):
        push(folder, Target(REPO))
    assert not hub.seen


@pytest.mark.parametrize("repo", ["guarded", "a/b/c", "./a", "tester/..", "tester/a b", "tester/-a"])
def test_what_is_no_repository_is_said_before_anything_is_sent(hub: HubServer, folder: Path, repo: str) -> None:
    with pytest.raises(InputError, match="not a hub repository"):
        push(folder, Target(repo))
    assert not hub.seen


@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_dies_anywhere_leaves_nothing_to_send_again(hub: HubServer, folder: Path, seed: int) -> None:
    size = sum(len(data) for data in contents(folder).values())
    left = random.Random(seed).randrange(size)
    dead = Fault("", times=0)

    def count(received: int) -> None:
        nonlocal left
        left -= received
        if left < 0:
            dead.times = 10**9

    hub.faults.append(dead)
    hub.on_bytes = count
    with pytest.raises(InputError, match=r"cannot be pushed to \(the connection failed: .*; try again\)"):
        push(folder, Target(REPO))
    hub.faults.clear()
    hub.on_bytes = lambda received: None
    finished = list(hub.stored)
    push(folder, Target(REPO))
    assert pushed(hub) == contents(folder)
    assert len(hub.stored) == len(set(hub.stored))
    assert not set(finished) & set(hub.stored[len(finished) :])
    assert verify(REPO).differences == []


PUSH = "import sys; sys.argv = ['guardfold', *sys.argv[1:]]; from guardfold.cli import main; main()"


def test_a_push_that_is_killed_goes_on_and_the_token_is_nowhere(folder: Path, tmp_path: Path) -> None:
    """A real process, killed in the middle of an object; then again, to the end; then everything is searched."""
    home = tmp_path / "home"
    with HubServer() as hub:
        environment = {**os.environ, **hub.environment(str(home)), "HF_DEBUG": "1"}
        command = [sys.executable, "-c", PUSH, "push", str(folder), REPO, "--debug"]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        hub.on_bytes = lambda count: process.send_signal(signal.SIGKILL) if hub.stored else None
        first = process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert hub.stored and REPO in hub.repos and "config.json" not in hub.repos[REPO].files()
        hub.on_bytes = lambda count: None
        second = subprocess.run(command, env=environment, capture_output=True, check=True)
        assert pushed(hub) == contents(folder)
        assert len(hub.stored) == len(set(hub.stored))
        said = b"".join([*first, second.stdout, second.stderr])
        written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        everywhere = [
            said,
            *written,
            *hub.lfs.values(),
            *pushed(hub).values(),
            *map(str.encode, hub.repos[REPO].messages),
        ]
        assert not any(hub.token.encode() in data for data in everywhere)
        assert not any("authorization" in each.headers for each in hub.requests("/storage/"))


def test_a_model_is_had_at_its_commit_and_only_what_is_needed_of_it(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = contents(folder)
    extra = {"pytorch_model.bin": b"x", "consolidated.safetensors": b"x" * 10, "run.py": b"x", "video.mp4": b"x"}
    commit = hub.add("owner/base", {**files, **extra})
    hub.add("owner/base", {"config.json": b"{}"})
    place, name = resolve(f"owner/base@{commit}")
    assert (place.name, name) == (commit, "owner/base")
    assert set(contents(place)) == {
        path for path in files if path != "guardfold/guard.safetensors" and path != "report.html"
    }
    assert tensors(place).keys() == tensors(folder).keys()
    asked = len(hub.seen)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download("owner/base", commit) == place
    assert len(hub.seen) == asked


def test_a_branch_is_resolved_and_recorded(hub: HubServer, folder: Path) -> None:
    hub.add("owner/base", contents(folder))
    commit = hub.add("owner/base", contents(folder), branch="v2")
    place, _ = resolve("owner/base@v2")
    assert place.name == commit


@pytest.mark.parametrize(
    ("about", "name", "says"),
    [
        ({}, "owner/absent", "no such repository"),
        ({"private": True}, "owner/base", "no such repository, or a private one"),
        ({"gated": True}, "owner/base", "it is gated: accept its terms"),
        ({}, "owner/base@absent", "it has no such revision"),
    ],
)
def test_a_model_that_cannot_be_had_is_said_in_one_line(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any], name: str, says: str
) -> None:
    hub.add("owner/base", {"config.json": b"{}"}, **about)
    if about:
        monkeypatch.setenv("HF_TOKEN", "hf_anothersTOKEN")
    with pytest.raises(InputError, match=says) as error:
        resolve(name)
    assert "\n" not in str(error.value) and "hf_another" not in str(error.value)
    assert error.value.__cause__ is None and error.value.__suppress_context__


@pytest.mark.parametrize("fault", [Fault("GET", 503, times=2), Fault("GET", times=2), Fault("HEAD", 500, times=2)])
def test_a_download_is_tried_again(hub: HubServer, folder: Path, fault: Fault) -> None:
    hub.add("owner/base", contents(folder))
    hub.faults.append(fault)
    place, _ = resolve("owner/base")
    assert tensors(place).keys() == tensors(folder).keys()


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors", "c": 3}}', "[" * 50_000),
        '{"weight_map": {"a": "b.safetensors"}, "a": [' + "[]," * MAX_PARTS + "[]]}",
    ],
)
def test_an_index_that_is_unsound_names_nothing(hub: HubServer, text: str) -> None:
    files = {"config.json": b"{}", "model.safetensors.index.json": text.encode(), "b.safetensors": b"x"}
    hub.add("owner/base", files)
    assert set(contents(download("owner/base"))) == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no guardfold.json"),
        ("{", "not sound JSON"),
        ("[]", "not a JSON object"),
        ('{"files": {}}', "not a manifest"),
    ],
)
def test_a_folder_without_a_manifest_is_not_verified(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "guardfold.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        verify(str(tmp_path))
