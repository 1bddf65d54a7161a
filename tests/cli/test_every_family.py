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
from specimens import Knobs

from guardfold.export.formats.onnx.paths import PATHS

pytestmark = pytest.mark.processors

IN_CI = (
    *("llava", "llava-onevision", "qwen2.5-vl", "internvl", "smolvlm", "paligemma", "pixtral", "llama-vision"),
    *("llama4", "lfm2-vl", "blip2", "fuyu"),
)
"""One of each kind of processor, of prompt and of layer; the others are marked `alike`."""

DRAWN_IN_CI = ("idefics3", "qwen2.5-vl", "mistral-small")
"""Of families with graphs, three whose vision paths are least alike; `pytest -m families` draws all others."""


def families(*aliases: str, in_ci: tuple[str, ...]) -> list[Any]:
    """The aliases as parameters, marked with what they need and whether another like them is run."""
    marks = {
        alias: [
            *([pytest.mark.vision] if REAL[alias].vision else []),
            *([pytest.mark.alike] if alias not in in_ci else []),
        ]
        for alias in aliases
    }
    return [pytest.param(alias, marks=marks[alias]) for alias in aliases]


NO_GRAPHS = {"pixtral": "vision tower of pixtral", "paligemma2": "sliding windows"}
"""Alias of a family with graphs that itself has none -> why."""

DRAWN = [
    alias
    for alias, family in REAL.items()
    if family.specimen.config(Knobs()).model_type in PATHS and alias not in NO_GRAPHS
]
"""Those that have graphs."""

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

    def export(self, form: str, *more: object) -> dict[str, Any]:
        """What the report of the folder named after `form` says."""
        chosen = ("-g", "projection.safetensors", "--format", form, "--allow-weaker", "--overwrite")
        self("export", "-m", self.folder, *chosen, "-o", form, *more)
        report: dict[str, Any] = json.loads((self.folder.parent / form / "report.json").read_text())
        return report


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    with Command(tmp_path_factory.mktemp("command")) as command:
        yield command


@pytest.fixture
def line(request: pytest.FixtureRequest, tmp_path: Path, prompts: Path, command: Command) -> Line:
    folder = REAL[request.param].save(tmp_path / "model", layers=2)
    command.tries(folder)
    return Line(command, folder, prompts)


@pytest.mark.parametrize("line", families(*REAL, in_ci=IN_CI), indirect=True)
def test_a_family_goes_through_the_command_line(line: Line) -> None:
    line("inspect", line.folder)
    line.extract("projection", "--layers", "last-half")
    few = ("--layers", "1", "--benign", line.prompts / "benign.jsonl", "--false-positive-rate", "0.05")
    gated = line.extract("gate", *few, ends=(0, 2, 3))  # 3: a random model's gate may be no good
    assert gated.status != 2 or "dense MLP" in gated.err or "gate" in gated.err

    weights = line.export("safetensors", "--probes", line.prompts / "probes.jsonl")
    assert weights["equivalence"]["compared"] == ["text", "image"]
    assert weights["original"]["text"]["answered"]["total"]
    line("check", "safetensors", "--against", line.folder, "--skip-behaviour")
    for picture in ((), ("--image", line.prompts / "picture.png")):
        line("chat", "safetensors", "how to walk ?", "--max-tokens", "4", *picture)

    adapter = line.export("lora", "--skip-behaviour", "--allow-partial")
    assert adapter["equivalence"]["compared"] == ["text", "image"]


@pytest.mark.parametrize("line", families(*DRAWN, in_ci=DRAWN_IN_CI), indirect=True)
def test_a_family_with_graphs_answers_by_them(line: Line) -> None:
    line.extract("projection", "--layers", "last-half")
    graphs = line.export("onnx", "--skip-behaviour")
    assert all(each["greedy"] == 1 for each in graphs["runtime"]["formats"])
    line("chat", "onnx", "how to walk ?", "--image", line.prompts / "picture.png", "--max-tokens", "4")


@pytest.mark.parametrize("line", families(*NO_GRAPHS, in_ci=("pixtral",)), indirect=True)
def test_a_family_whose_parts_have_no_graphs_says_which(line: Line, request: pytest.FixtureRequest) -> None:
    line.extract("projection", "--layers", "last-half")
    asked = ("-g", "projection.safetensors", "--format", "onnx", "-o", "onnx", "--skip-behaviour")
    assert NO_GRAPHS[request.node.callspec.params["line"]] in line("export", "-m", line.folder, *asked, ends=(2,)).err
