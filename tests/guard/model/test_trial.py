"""A processor is tried in a process of its own, once for the same files; all are forked from one interpreter."""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deadline import within
from zoo import change_json

from guardfold.guard.base.errors import InputError
from guardfold.guard.base.remote_code import trusting
from guardfold.guard.model import trial
from guardfold.guard.model.vlm import DEMO_FOLDER, load_processor

BROKEN = "{% for %}"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[trial.Request]:
    """What is asked of the interpreter."""
    asked: list[trial.Request] = []
    packed = trial.Request.packed

    def listed(request: trial.Request) -> bytes:
        asked.append(request)
        return packed(request)

    monkeypatch.setattr(trial, "_sound", set())
    monkeypatch.setattr(trial.Request, "packed", listed)
    return asked


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The interpreters that are started: nothing is tried and none runs when the test begins."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*args: Any, **kwargs: Any) -> Any:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(trial, "_sound", set())
    monkeypatch.setattr(trial, "_server", None)
    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    if trial._server:
        trial._server.requests.close()
        trial._server.process.wait()


def descriptors(process: int) -> list[str]:
    place = Path(f"/proc/{process}/fd")
    return [str(descriptor.readlink()) for descriptor in place.iterdir() if descriptor.is_symlink()]


def test_the_same_files_are_tried_once_and_changed_ones_again(model: Path, asked: list[trial.Request]) -> None:
    load_processor(model)
    (model / "report.json").write_text("{}")
    change_json(model / "config.json", image_seq_length=9)
    load_processor(model)
    assert len(asked) == 1
    change_json(model / "processor_config.json", patch_size=4)
    load_processor(model)
    assert len(asked) == 2


def test_what_is_refused_is_not_remembered(model: Path, asked: list[trial.Request]) -> None:
    (model / "chat_template.jinja").write_text(BROKEN)
    for count in (1, 2):
        with pytest.raises(InputError, match="chat template fails"):
            load_processor(model)
        assert len(asked) == count


def test_one_interpreter_tries_all_keeps_nothing_of_them_and_is_replaced_when_it_has_ended(
    model: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        load_processor(model)
    (server,) = started
    before = descriptors(server.pid)
    assert not [name for name in before if name.startswith(str(tmp_path))]
    assert "Threads:\t1\n" in Path(f"/proc/{server.pid}/status").read_text()

    monkeypatch.chdir(model.parent)
    (model / "chat_template.jinja").write_text(BROKEN)
    for name in (Path(model.name), model):
        with pytest.raises(InputError, match=f"^{name}: its chat template fails"):
            load_processor(name)
    assert len(started) == 1 and descriptors(server.pid) == before

    server.kill()
    server.wait()
    with pytest.raises(InputError, match="chat template fails"):
        load_processor(model)
    assert len(started) == 2


SEEN = """
import os, resource, signal
from pathlib import Path
from transformers import LlavaProcessor

files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
threads, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Threads"))
if not Path(SEEN).exists():  # it is run once more when the processor is loaded
    Path(SEEN).write_text(repr({
        "files": sorted(os.readlink(name).partition(":")[0] for name in files if os.path.islink(name)),
        "threads": threads.split()[1],
        "seconds": signal.getitimer(signal.ITIMER_REAL)[0],
        "limited": resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY,
        "alarm": signal.getsignal(signal.SIGALRM) == signal.SIG_DFL,
    }))

class Seeing(LlavaProcessor):
    pass
"""


def test_the_process_that_tries_has_bounds_one_thread_and_no_file_but_its_socket(
    model: Path, tmp_path: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from within, by a processor that is code. An interpreter that nobody asks anything ends."""
    monkeypatch.setattr(trial, "IDLE_SECONDS", 0.1)
    seen = tmp_path / "seen"
    (model / "seeing.py").write_text(SEEN.replace("SEEN", repr(str(seen))))
    change_json(model / "processor_config.json", auto_map={"AutoProcessor": "seeing.Seeing"})
    with (tmp_path / "open").open("w") as file, trusting(True):
        os.set_inheritable(file.fileno(), True)
        assert type(load_processor(model)).__name__ == "Seeing"
    found = ast.literal_eval(seen.read_text())
    assert 0 < found.pop("seconds") <= 120
    assert found == {"files": ["/dev/null", "/dev/null", "socket"], "threads": "1", "limited": True, "alarm": True}
    with within(60):
        assert started[0].wait() == 0


def test_an_interpreter_that_does_not_start_is_said(
    model: Path, started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="cannot be tried: /bin/false ends with status 1"):
        load_processor(model)


def test_the_demo_comes_with_the_package_and_is_not_tried(asked: list[trial.Request]) -> None:
    load_processor(DEMO_FOLDER)
    assert not asked
