"""Whatever ends a run - a signal, a full disk, a source that changes - the output is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import (
    FORMATS,
    absent_or_whole,
    disk,
    ended,
    fails,
    forked,
    killed_exports,
    model_and_guard,
    run,
)
from deadline import within
from zoo import tensors

from guardfold import cli
from guardfold.export.checkpoint import rewrite as rewriter
from guardfold.export.checkpoint import staging as stages
from guardfold.export.checkpoint.staging import staging
from guardfold.export.formats.lora.adapters import Adapter
from guardfold.guard.base.errors import InputError
from guardfold.guard.model import trial
from guardfold.guard.model.vlm import load_processor


@pytest.fixture(params=FORMATS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `model`, in one file or in shards, and `guard.safetensors`."""
    model_and_guard(tmp_path, FORMATS[request.param])
    return tmp_path


def nothing_left(place: Path) -> bool:
    return not (place / "out").exists() or not any((place / "out").iterdir())


@pytest.mark.parametrize("shards", FORMATS)
def test_an_export_killed_at_a_random_moment_leaves_no_half_output(tmp_path: Path, shards: str) -> None:
    killed, finished = killed_exports(tmp_path, FORMATS[shards], 4, seed=len(shards))
    assert killed + finished == 4
    assert killed > 0


@pytest.mark.parametrize(
    ("step", "overwrite"),
    [
        ("pwrite", False),
        ("copy_file_range", True),
        ("fsync", False),
        ("_check_replaceable", True),
        ("rename", False),
        ("_exchange", True),
    ],
)
def test_an_export_killed_at_a_step_leaves_what_was_there_and_the_next_one_works(
    tmp_path: Path, step: str, overwrite: bool
) -> None:
    model_and_guard(tmp_path, "5GB")
    if overwrite:
        run(tmp_path)
        (tmp_path / "out" / "guarded" / "first").touch()

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        owner: Any = stages if step.startswith("_") else Path if step == "rename" else os
        calls = iter([step == "_check_replaceable"])  # that one is passed once before anything is written
        before = getattr(owner, step)
        setattr(owner, step, lambda *a, **k: before(*a, **k) if next(calls, False) else die())
        run(tmp_path, overwrite)

    assert ended(forked(killed)) == -signal.SIGKILL
    assert (tmp_path / "out" / "guarded" / "first").exists() == overwrite
    assert absent_or_whole(tmp_path / "out" / "guarded", tmp_path / "model") == overwrite
    run(tmp_path, overwrite)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["guarded"]
    assert not (tmp_path / "out" / "guarded" / "first").exists()


def runs(process: str) -> bool:
    """Whether the process is there and has not ended: one that nobody waits for stays as a zombie."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"


def children(process: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return []


def trial_of(process: int) -> list[str]:
    """The ids of the processes, each started by the one before and the first by `process`, of which the last tries a
    processor; waits until there are all three.
    """
    while True:
        ids = [str(process)]
        while started := children(ids[-1]):
            ids.append(started[0])
        if len(ids) == 4:
            return ids[1:]
        time.sleep(0.01)


@pytest.mark.parametrize("closed", [(), (0, 1, 2)], ids=["with streams", "without"])
def test_a_run_killed_while_it_tries_a_processor_leaves_no_lock_and_no_process(
    tmp_path: Path, model: Path, closed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without standard streams, the lock gets the number of one."""
    output = tmp_path / "guarded"
    (model / "chat_template.jinja").write_text(ENDLESS)
    monkeypatch.setattr(trial, "SECONDS", 600.0)
    monkeypatch.setattr(trial, "_server", None)

    def killed() -> None:
        for stream in closed:
            os.close(stream)
        with staging(output, False):
            load_processor(model)

    child = forked(killed)
    with within(300):
        trying = trial_of(child)
        for process in trying:
            os.kill(int(process), signal.SIGSTOP)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        with staging(output, False) as stage:
            (stage / "a").touch()
        assert all(map(runs, trying)), "they are still there, so that the lock is free is no accident"
        for process in trying:
            os.kill(int(process), signal.SIGCONT)
        while any(map(runs, trying)):
            time.sleep(0.01)


def test_an_interrupt_ends_the_process_that_tries_a_processor(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "chat_template.jinja").write_text(ENDLESS)
    monkeypatch.setattr(trial, "SECONDS", 600.0)
    monkeypatch.setattr(trial, "_server", None)

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            load_processor(model)
        (server,) = children(str(os.getpid()))
        assert not any(map(children, children(server)))
        (model / "chat_template.jinja").write_text("{% for %}")
        with pytest.raises(InputError, match="chat template fails"):
            load_processor(model)
        assert children(str(os.getpid())) == [server]

    child = forked(interrupted)
    with within(300):
        trying = trial_of(child)
        os.kill(child, signal.SIGINT)
        assert ended(child) == 0
        assert not runs(trying[-1])
        while any(map(runs, trying)):
            time.sleep(0.01)


def test_an_interrupt_from_the_keyboard_ends_them_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to every process of the group."""
    (model / "chat_template.jinja").write_text(ENDLESS)
    monkeypatch.setattr(trial, "SECONDS", 600.0)
    monkeypatch.setattr(trial, "_server", None)

    def interrupted() -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            load_processor(model)

    child = forked(interrupted)
    with within(300):
        trying = trial_of(child)
        os.killpg(child, signal.SIGINT)
        assert ended(child) == 0
        while any(map(runs, trying)):
            time.sleep(0.01)


def test_of_two_exports_to_one_output_one_wins(place: Path) -> None:
    children = [forked(lambda: run(place)) for _ in range(2)]
    assert sorted(ended(child) for child in children) == [0, 2]
    assert absent_or_whole(place / "out" / "guarded", place / "model")
    assert [path.name for path in (place / "out").iterdir()] == ["guarded"]


def test_only_what_guardfold_wrote_is_replaced(place: Path) -> None:
    output = place / "out" / "guarded"
    output.mkdir(parents=True)
    run(place, overwrite=True)
    (output / "guardfold.json").unlink()
    with pytest.raises(InputError, match=r"holds no guardfold\.json, so guardfold did not write it"):
        run(place, overwrite=True)
    assert (output / "config.json").exists()
    (place / "linked").symlink_to(output)
    with pytest.raises(InputError, match="exists and is not a folder"), staging(place / "linked", True):
        pytest.fail("entered")


def test_the_disk_is_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_and_guard(tmp_path, "5GB")
    with disk(tmp_path / "out", "300k") as mounted:
        if not mounted:
            monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 300_000}))
        with pytest.raises(InputError, match=r"out: 0\.00 GB are needed, 0\.00 GB are free; make room") as error:
            run(tmp_path)
        assert nothing_left(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["64k", "116k", "128k"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(tmp_path: Path, size: str) -> None:
    """Other programs took the room after it was asked for: with a disk too small, or files limited in size."""
    model_and_guard(tmp_path, "5GB")
    said = tmp_path / "said"

    def full(limited: bool) -> None:
        stages.ROOM_TO_SPARE = -(2**40)
        if limited:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(size[:-1]) * 1024 // 2, resource.RLIM_INFINITY))
        try:
            run(tmp_path)
        except InputError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said.write_text(str(error))
            raise

    with disk(tmp_path / "out", size) as mounted:
        assert ended(forked(lambda: full(not mounted))) == 2
        assert nothing_left(tmp_path)
    assert "; nothing was written to" in said.read_text()
    assert os.strerror(errno.ENOSPC if mounted else errno.EFBIG) in said.read_text()
    assert len(said.read_text().splitlines()) == 1


def test_an_adapter_that_the_disk_does_not_take_is_the_disk_s_error(tmp_path: Path) -> None:
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            Adapter(False, {"a": torch.zeros(1000)}).save(tmp_path / "adapter", "base", None)

    assert ended(forked(full)) == 0


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def changed_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def replaced(path: Path) -> None:
    """By another file of the same size and time."""
    state, data = path.stat(), path.read_bytes()
    path.with_name("other").write_bytes(data[:-1] + b"\xff")
    path.with_name("other").replace(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def header_changed(path: Path) -> None:
    """In place, at the same size and time."""
    state, data = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:8] + data[8:].replace(b'"format":"pt"', b'"format":"tp"', 1))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", [appended, cut, changed_in_place, replaced, header_changed])
def test_a_source_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_and_guard(tmp_path, "20KB")
    file = min((tmp_path / "model").glob("*.safetensors"))
    todo = iter([change])

    def meanwhile(queues: Any, jobs: int) -> None:
        next(todo)(file)
        before(queues, jobs)

    before = rewriter.in_threads
    monkeypatch.setattr(rewriter, "in_threads", meanwhile)
    with pytest.raises(InputError, match=r"was changed while being read|was cut short while being read") as error:
        run(tmp_path)
    assert file.name in str(error.value) and "\n" not in str(error.value)
    assert nothing_left(tmp_path)


@pytest.fixture
def wanted(place: Path) -> dict[str, Any]:
    """The tensors of an export that nothing disturbed."""
    run(place)
    found = tensors(place / "out" / "guarded")
    (place / "out" / "guarded").rename(place / "undisturbed")
    return found


def short(name: str, most: int) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The function of os `name`, returning after `most` bytes."""
    before: Any = getattr(os, name)
    if name == "preadv":
        yield name, lambda descriptor, buffers, *where: before(descriptor, [buffers[0][:most]], *where)
    elif name == "pwrite":
        yield name, lambda descriptor, data, offset: before(descriptor, data[:most], offset)
    elif name == "sendfile":
        yield name, lambda target, source, offset, count: before(target, source, offset, min(count, most))
    else:
        yield name, lambda source, target, count, begin, to: before(source, target, min(count, most), begin, to)


@pytest.mark.parametrize("way", ["copy_file_range", "sendfile", "memory"])
def test_every_way_to_copy_writes_the_same_even_in_small_pieces(
    place: Path, wanted: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "pwrite", "sendfile", "copy_file_range"):
        for each, replacement in short(name, 4001):
            monkeypatch.setattr(os, each, replacement)
    if way != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", fails(errno.EXDEV))
    if way == "memory":
        monkeypatch.setattr(os, "sendfile", fails(errno.EINVAL))
    run(place)
    got = tensors(place / "out" / "guarded")
    assert got.keys() == wanted.keys()
    assert all(got[name].equal(wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("preadv", errno.EIO, "cannot be read at byte .*Input/output error"),
        ("pwrite", errno.EIO, "guarded: Input/output error; nothing was written to"),
        ("pwrite", errno.EDQUOT, "Disk quota exceeded; nothing was written to"),
        ("fsync", errno.EIO, "Input/output error; nothing was written to"),
    ],
)
def test_a_disk_that_fails_is_named_in_one_line_and_nothing_is_left(
    tmp_path: Path, name: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_and_guard(tmp_path, "5GB")
    monkeypatch.setattr(os, name, fails(code))
    with pytest.raises(InputError, match=says) as error:
        run(tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert nothing_left(tmp_path)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model_and_guard(tmp_path, "5GB")
    (tmp_path / "out").mkdir(mode=0o555)
    with disk(tmp_path / "out", "1m,ro") as mounted:
        if not mounted and os.geteuid() == 0:  # who may write anywhere, but not below a file
            (tmp_path / "out").rmdir()
            (tmp_path / "out").touch()
        with pytest.raises(InputError, match=r"out: cannot be written to \(") as error:
            run(tmp_path)
    assert "\n" not in str(error.value)


def test_an_interrupted_command_ends_with_130_one_line_and_nothing_left(tmp_path: Path) -> None:
    model_and_guard(tmp_path, "5GB")

    def command() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        paths = {"--model": "model", "--guard": "guard.safetensors", "--output": "out/guarded"}
        sys.argv = ["guardfold", "export", "--skip-behaviour", *(str(word) for pair in paths.items() for word in pair)]
        os.chdir(tmp_path)
        os.dup2(os.open(tmp_path / "said", os.O_RDWR | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        monkeypatched = rewriter.in_threads

        def slow(queues: Any, jobs: int) -> None:
            monkeypatched([[lambda: time.sleep(0.2)], *queues], jobs)
            time.sleep(60)

        rewriter.in_threads = slow
        try:
            cli.main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))

    child = forked(command)
    partial = tmp_path / "out" / ".guarded.guardfold-partial" / "model.safetensors"
    while not partial.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert ended(child) == 130
    said = [line for line in (tmp_path / "said").read_text().splitlines() if line]
    assert said == ["guardfold: interrupted; nothing half-written is left"]
    assert nothing_left(tmp_path)
