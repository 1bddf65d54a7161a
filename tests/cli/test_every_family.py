"""Every family that has an alias, with its real processor, through the command line: extract, export, check, chat, an
adapter, and graphs where it has some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Command, Done
from PIL import Image
from real_processors import REAL

from guardfold.export.formats.onnx.paths import PATHS

pytestmark = pytest.mark.processors

FAMILIES = [pytest.param(alias, marks=[pytest.mark.vision] if family.vision else []) for alias, family in REAL.items()]
NO_GATE = {"fuyu", "glm-4.1v", "paligemma2", "gemma3", "idefics2"}
"""Whose MLPs hold none, for one reason or another that `inspect` gives."""

VERBS = ("walk", "paint", "open", "bake", "buy", "find", "use", "sell")
THINGS = ("a car", "the wall", "bread", "a lock", "the door")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with anchors, benign prompts and probes, few of each."""
    folder = tmp_path_factory.mktemp("prompts")
    pairs = [(verb, thing) for verb in VERBS for thing in THINGS]
    anchors = [{"harmful": f"how to steal {b} and {a} ?", "harmless": f"how to {a} {b} ?"} for a, b in pairs]
    benign = [{"text": f"why do people {verb} {thing} ?"} for verb, thing in pairs]
    probes = [{"text": f"where to {verb} {thing} ?", "harmful": verb < "e"} for verb, thing in pairs[::3]]
    written: dict[str, Any] = {"anchors": anchors, "benign": benign, "probes": probes}
    for name, rows in written.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    Image.new("RGB", (50, 30), "red").save(folder / "picture.png")
    return folder


class Line:
    """The command line on the model in `folder`; each run must end as it says, in silence or with one line."""

    def __init__(self, command: Command, folder: Path, prompts: Path) -> None:
        self.command, self.folder, self.prompts = command, folder, prompts
        self.anchors = ("--anchors", prompts / "anchors.jsonl")

    def __call__(self, *arguments: object, ends: tuple[int, ...] = (0,)) -> Done:
        done = self.command(*arguments, cwd=self.folder.parent)
        assert done.status in ends and len(done.err.splitlines()) == (done.status != 0), done.err
        return done

    def extract(self, guard: str, *more: object, ends: tuple[int, ...] = (0,)) -> Done:
        return self(
            "extract", "-m", self.folder, "-g", guard, *self.anchors, "-o", f"{guard}.safetensors", *more, ends=ends
        )

    def export(self, form: str, *more: object) -> dict[str, object]:
        """What the report of the folder named after `form` says."""
        chosen = ("-g", "projection.safetensors", "--format", form, "--allow-weaker", "--overwrite")
        self("export", "-m", self.folder, *chosen, "-o", form, *more)
        report: dict[str, object] = json.loads((self.folder.parent / form / "report.json").read_text())
        return report


@pytest.fixture
def line(request: pytest.FixtureRequest, tmp_path: Path, prompts: Path) -> Iterator[Line]:
    folder = REAL[request.param].save(tmp_path / "model", layers=4)
    with Command(tmp_path, folder) as command:
        yield Line(command, folder, prompts)


@pytest.mark.parametrize("line", FAMILIES, indirect=True)
def test_a_family_goes_through_the_command_line(line: Line, request: pytest.FixtureRequest) -> None:
    alias = request.node.callspec.params["line"]
    kind = json.loads((line.folder / "config.json").read_text())["model_type"]
    line("inspect", line.folder)
    line.extract("projection", "--layers", "last-half")
    few = ("--benign", line.prompts / "benign.jsonl", "--false-positive-rate", "0.05")
    line.extract("gate", *few, ends=(2,) if alias in NO_GATE else (0, 3))

    weights = line.export("safetensors", "--probes", line.prompts / "probes.jsonl")
    assert weights["equivalence"]["compared"] == ["text", "image"]  # type: ignore[index]
    assert weights["original"]["text"]["answered"]["total"]  # type: ignore[index]
    line("check", "safetensors", "--against", line.folder, "--skip-behaviour")
    for picture in ((), ("--image", line.prompts / "picture.png")):
        line("chat", "safetensors", "how to walk ?", "--max-tokens", "4", *picture)

    adapter = line.export("lora", "--skip-behaviour", "--allow-partial")
    assert adapter["equivalence"]["compared"] == ["text", "image"]  # type: ignore[index]
    if kind in PATHS and alias not in ("pixtral", "paligemma2", "granite-vision"):
        graphs = line.export("onnx", "--skip-behaviour")
        assert all(each["greedy"] == 1 for each in graphs["runtime"]["formats"])  # type: ignore[index]
        line("chat", "onnx", "how to walk ?", "--image", line.prompts / "picture.png", "--max-tokens", "4")
