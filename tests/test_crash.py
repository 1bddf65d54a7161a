"""Whatever ends a run - a signal, a full disk, a source that changes - the output is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from crash import FORMATS, absent_or_whole, disk, ended, export, forked, killed_exports, model_and_guard
from test_checkpoint import within
from zoo import tensors

from guardfold import cli
from guardfold.export import rewrite as rewriter
from guardfold.export import staging as stages
from guardfold.export.staging import check_room, staging
from guardfold.guard import processing
from guardfold.guard.errors import InputError


@pytest.fixture(params=FORMATS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `model`, in one file or in shards, and `guard.safetensors`."""
    model_and_guard(tmp_path, FORMATS[request.param])
    return tmp_path


def run(place: Path, overwrite: bool = False) -> None:
    export(place / "model", place / "guard.safetensors", place / "out" / "guarded", overwrite)


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


class Endless:
    """A processor whose chat template never ends; it leaves the id of the process that renders it in `said`."""

    def __init__(self, said: Path) -> None:
        self.said = said

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        self.said.with_suffix(".new").write_text(str(os.getpid()))
        self.said.with_suffix(".new").replace(self.said)
        while True:
            pass


@pytest.mark.parametrize("closed", [(), (0, 1, 2)], ids=["with streams", "without"])
def test_a_run_killed_while_it_tries_a_processor_leaves_no_lock_and_no_process(
    tmp_path: Path, closed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without standard streams, the lock gets the number of one."""
    said, processor, output = tmp_path / "said", Endless(tmp_path / "said"), tmp_path / "guarded"
    monkeypatch.setattr(processing, "SECONDS", 2.0)

    def killed() -> None:
        for stream in closed:
            os.close(stream)
        with staging(output, False):
            processing.check_processor(cast(Any, processor), tmp_path)

    child = forked(killed)
    with within(60):
        while not said.exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        with staging(output, False) as stage:
            (stage / "a").touch()
        assert runs(said.read_text()), "it renders still, so that the lock is free is no accident"
        while runs(said.read_text()):
            time.sleep(0.01)


def test_an_interrupt_ends_the_process_that_tries_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, processor = tmp_path / "said", Endless(tmp_path / "said")
    monkeypatch.setattr(processing, "SECONDS", 600.0)

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            processing.check_processor(cast(Any, processor), tmp_path)
        assert not runs(said.read_text())

    child = forked(interrupted)
    with within(60):
        while not said.exists():
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        assert ended(child) == 0


def test_an_interrupt_while_an_output_is_published_waits_until_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_and_guard(tmp_path, "5GB")
    run(tmp_path)
    publish = stages._publish

    def interrupted(*paths: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        publish(*paths)

    monkeypatch.setattr(stages, "_publish", interrupted)
    (tmp_path / "out" / "guarded" / "first").touch()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are started deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, overwrite=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["guarded"]
    assert not (tmp_path / "out" / "guarded" / "first").exists()
    assert absent_or_whole(tmp_path / "out" / "guarded", tmp_path / "model")


def test_where_names_cannot_be_exchanged_a_rename_that_fails_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_and_guard(tmp_path, "5GB")
    run(tmp_path)
    (tmp_path / "out" / "guarded" / "first").touch()
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith("-partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(stages, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="nothing was written"):
        run(tmp_path, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["guarded"]
    assert (tmp_path / "out" / "guarded" / "first").exists()


def test_an_output_that_is_there_is_not_called_unwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the rename nothing takes it back: that the folder it is in cannot be synced is no failure."""
    sync = stages._sync

    def failing(path: Path) -> None:
        if path == tmp_path / "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(stages, "_sync", failing)
    model_and_guard(tmp_path, "5GB")
    for overwrite in (False, True):
        run(tmp_path, overwrite)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["guarded"]
        assert absent_or_whole(tmp_path / "out" / "guarded", tmp_path / "model")


def test_read_only_folders_are_replaced_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users whom the system obeys such modes for: root is above them."""
    model_and_guard(tmp_path, "5GB")
    run(tmp_path)
    old = tmp_path / "out" / "guarded"
    rmtree = shutil.rmtree

    def strict(folder: Path) -> None:
        if any(not path.stat().st_mode & 0o200 for path in [folder, *folder.rglob("*")] if path.is_dir()):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        rmtree(folder)

    monkeypatch.setattr("shutil.rmtree", strict)
    for folder in (old / "guardfold", old):
        folder.chmod(0o555)
    run(tmp_path, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["guarded"]


def test_a_filesystem_without_locks_is_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", fails(errno.ENOLCK))
    with pytest.raises(InputError, match="a/b: cannot be locked"), staging(tmp_path / "a" / "b" / "c", False):
        pytest.fail("entered")
    assert not any(tmp_path.iterdir())


def test_folders_made_for_an_output_that_is_not_to_be_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), staging(tmp_path / "a" / "b" / "c" / "d", False):
        raise RuntimeError
    assert not any((tmp_path / "a").iterdir())


def test_a_link_in_place_of_what_was_replaced_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / ".guarded.guardfold-replaced").symlink_to(tmp_path / "other")
    with staging(tmp_path / "guarded", False) as stage:
        (stage / "a").touch()
    assert not (tmp_path / "guarded").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guarded", "other"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", b"a\xff"])
def test_an_output_without_a_name_that_all_can_read_is_refused(name: str | bytes) -> None:
    with pytest.raises(InputError, match=r"has no name|not UTF-8"), staging(Path(os.fsdecode(name)), True):
        pytest.fail("entered")


def test_a_folder_is_made_with_the_user_s_mask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with staging(tmp_path / "guarded", False) as stage:
            (stage / "a").touch()
    finally:
        os.umask(before)
    assert (tmp_path / "guarded").stat().st_mode & 0o777 == 0o700


def test_where_names_cannot_be_exchanged_a_kill_between_the_renames_is_made_good(tmp_path: Path) -> None:
    model_and_guard(tmp_path, "5GB")
    run(tmp_path)
    (tmp_path / "out" / "guarded" / "first").touch()

    def killed() -> None:
        rename, calls = Path.rename, iter([True])

        def once(path: Path, target: Path) -> Path:
            if not next(calls, False):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)

        patch = pytest.MonkeyPatch()
        patch.setattr(stages, "_exchange", lambda *_: False)
        patch.setattr(Path, "rename", once)
        run(tmp_path, True)

    assert ended(forked(killed)) == -signal.SIGKILL
    assert not (tmp_path / "out" / "guarded").exists()
    with pytest.raises(RuntimeError), staging(tmp_path / "out" / "guarded", False):
        raise RuntimeError
    assert (tmp_path / "out" / "guarded" / "first").exists()
    assert absent_or_whole(tmp_path / "out" / "guarded", tmp_path / "model")


def test_of_two_exports_to_one_output_one_wins(place: Path) -> None:
    children = [forked(lambda: run(place)) for _ in range(2)]
    assert sorted(ended(child) for child in children) == [0, 2]
    assert absent_or_whole(place / "out" / "guarded", place / "model")
    assert [path.name for path in (place / "out").iterdir()] == ["guarded"]


def test_while_one_export_runs_another_to_the_same_output_is_refused_at_once(tmp_path: Path) -> None:
    output = tmp_path / "guarded"
    with staging(output, False) as stage:
        (stage / "a").write_text("first")
        with pytest.raises(InputError, match="another run is writing it"), staging(output, False):
            pytest.fail("entered")
    assert (output / "a").read_text() == "first"


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


def test_room_is_counted_with_what_goes_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 * 10**9}))
    check_room(tmp_path, 4 * 10**9)
    with pytest.raises(InputError, match=r"4\.99 GB are needed, 5\.00 GB are free"):
        check_room(tmp_path, 4_990_000_000)


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


def fails(code: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


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
