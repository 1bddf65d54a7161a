"""Output folders: claimed by one run, published whole or not at all, and nothing left beside them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from crash import absent_or_whole, ended, fails, forked, model_and_guard, run

from guardfold.export.checkpoint import staging as stages
from guardfold.export.checkpoint.staging import check_room, staging
from guardfold.guard.base.errors import InputError


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

    def strict(folder: Path, **options: Any) -> None:
        folder = Path(folder)
        if any(not path.stat().st_mode & 0o200 for path in [folder, *folder.rglob("*")] if path.is_dir()):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        rmtree(folder, **options)

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


def test_while_one_export_runs_another_to_the_same_output_is_refused_at_once(tmp_path: Path) -> None:
    output = tmp_path / "guarded"
    with staging(output, False) as stage:
        (stage / "a").write_text("first")
        with pytest.raises(InputError, match="another run is writing it"), staging(output, False):
            pytest.fail("entered")
    assert (output / "a").read_text() == "first"


def test_room_is_counted_with_what_goes_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 * 10**9}))
    check_room(tmp_path, 4 * 10**9)
    with pytest.raises(InputError, match=r"4\.99 GB are needed, 5\.00 GB are free"):
        check_room(tmp_path, 4_990_000_000)
