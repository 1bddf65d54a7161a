"""One core, no network, no noise; and the tiny model that most tests read but never change."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if find_spec("torchvision"):  # for the tests marked vision, and for what they start
    VISION = str(Path(__file__).parent / "support" / "vision")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (VISION, os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, VISION)
    import torchvision_operators  # noqa: F401

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="guardfold-modules-")  # of models that come with code
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from command import Command
from hub_client import use_hub
from hub_server import HubServer
from transformers.utils import logging
from zoo import Tiny

from guardfold.guard.model import trial
from guardfold.guard.model.vlm import VLM, load

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
trial.IDLE_SECONDS = 3600.0  # one interpreter for all trials


SLOWEST_FIRST = (
    *("cli/test_guarded_demo", "export/families/test_families", "export/test_weight_edits", "cli/test_onnx_export"),
    *("cli/test_cli", "export/checkpoint/test_crash", "cli/test_adapter_command", "pipeline/test_output"),
    *("guard/base/test_trust", "export/formats/test_onnx_graphs", "pipeline/test_export", "export/test_gate_fold"),
    *("validators/runtimes/test_endpoint", "pipeline/test_opened_once", "validators/evidence/test_mutations"),
)
"""Files that take more than half a minute. What is left for the end is short, so that both processes end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / f"{name}.py": place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA on disk, with its processor; read only."""
    return Tiny().save(tmp_path_factory.mktemp("zoo") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> VLM:
    """The same, loaded in float32; whoever changes it must change it back."""
    return load(tiny_folder, "cpu", torch.float32)


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def guardfold(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Command]:
    """The command line; the tiny model's processor is tried once for all its runs."""
    with Command(tmp_path_factory.mktemp("command"), tiny_folder) as command:
        yield command


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that this process talks to, without waiting between attempts."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with HubServer() as server:
        use_hub(server, tmp_path / "home", monkeypatch)
        yield server
