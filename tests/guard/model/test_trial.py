"""A processor is tried in an interpreter of its own, once for the same files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from zoo import change_json

from guardfold.guard.base.errors import InputError
from guardfold.guard.model import trial
from guardfold.guard.model.vlm import DEMO_FOLDER, load_processor


class Started:
    """Stands in the way of subprocess.Popen: counts, and keeps what an interpreter had open just after it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.open = 0, list[str]()
        popen = subprocess.Popen

        def start(*args: Any, **kwargs: Any) -> Any:
            process = popen(*args, **kwargs)
            self.count += 1
            place = Path(f"/proc/{process.pid}/fd")
            self.open = [str(each.readlink()) for each in place.iterdir() if each.is_symlink()]
            return process

        monkeypatch.setattr(subprocess, "Popen", start)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    monkeypatch.setattr(trial, "_sound", set())
    return Started(monkeypatch)


def test_the_same_files_are_tried_once_and_changed_ones_again(model: Path, started: Started) -> None:
    load_processor(model)
    (model / "report.json").write_text("{}")
    change_json(model / "config.json", image_seq_length=9)
    load_processor(model)
    assert started.count == 1
    change_json(model / "processor_config.json", patch_size=4)
    load_processor(model)
    assert started.count == 2


def test_what_is_refused_is_not_remembered(model: Path, started: Started) -> None:
    (model / "chat_template.jinja").write_text("{% for %}")
    for count in (1, 2):
        with pytest.raises(InputError, match="chat template fails"):
            load_processor(model)
        assert started.count == count


def test_it_inherits_no_file(model: Path, tmp_path: Path, started: Started) -> None:
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        load_processor(model)
    assert started.count == 1 and started.open
    assert not [name for name in started.open if name.startswith(str(tmp_path))]


def test_an_interpreter_that_does_not_start_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_sound", set())
    monkeypatch.setattr(trial.sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="cannot be tried: /bin/false ends with status 1"):
        load_processor(model)


def test_the_demo_comes_with_the_package_and_is_not_tried(started: Started) -> None:
    load_processor(DEMO_FOLDER)
    assert started.count == 0
