"""An image kind is one row of one file: what selects kinds asks the rows, and a new row changes no comparison."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import guardfold
from guardfold.guard.prompts import image_kinds
from guardfold.guard.prompts.image_kinds import (
    ANCHOR_KINDS,
    BENIGN_KINDS,
    COMPARED_KINDS,
    IMAGE_KINDS,
    IMAGE_ROWS,
    TEXT,
)

SOURCE = Path(image_kinds.__file__)
END = ")\n" + '"""In the order of reports.'
ROW = (
    'Kind("stripes", lambda words, rng: Image.new("RGB", (SIZE, SIZE), "red"), Use.ANCHORS | Use.BENIGN | Use.MEASURED)'
)


def test_what_kinds_are_used_for() -> None:
    assert IMAGE_KINDS == ("text", "blank", "noise", "shape", "typographic")
    assert ANCHOR_KINDS == ("text", "blank", "noise", "shape")
    assert BENIGN_KINDS == ("blank", "noise", "gradient", "shape", "typographic")
    assert COMPARED_KINDS == ("shape", "typographic")
    assert [kind.name for kind in IMAGE_ROWS if kind.held_out] == ["typographic"]
    assert [kind.name for kind in IMAGE_ROWS if kind.drawn is None] == [TEXT]


def test_no_module_but_the_rows_and_the_demo_names_a_picture() -> None:
    root = Path(guardfold.__file__).parent
    pictures = {kind.name for kind in IMAGE_ROWS} - {TEXT, "shape"}  # "shape" is a tensor's as well
    for floor in ("guard", "export", "validators", "pipeline"):
        for path in sorted((root / floor).rglob("*.py")):
            if path != SOURCE and path.parent.name != "demo":
                nodes = ast.walk(ast.parse(path.read_text("utf-8")))
                words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
                assert not words & pictures, path


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown image kind 'stripes': one of text, blank"):
        image_kinds.draw("stripes", "", 0)


def selections(folder: Path) -> dict[str, Any]:
    """What everything that selects kinds selects, the model in `folder` being what is asked and compared."""
    from guardfold.guard.fitting.calibration import deal, examples
    from guardfold.guard.fitting.directions import extract
    from guardfold.guard.model.vlm import load
    from guardfold.guard.prompts.prompts import Anchors, Prompt
    from guardfold.validators.behaviour.evaluation_prompts import EvaluationPrompts
    from guardfold.validators.behaviour.judge import PhraseJudge
    from guardfold.validators.behaviour.measure import observe
    from guardfold.validators.behaviour.recorded import record
    from guardfold.validators.behaviour.verdict import judge_guard
    from guardfold.validators.evidence.batches import comparison_batches
    from guardfold.validators.evidence.runtime import comparison

    vlm = load(folder, "cpu")
    behaviour = observe(
        lambda prompts, what, kind: ["yes"] * len(prompts),
        EvaluationPrompts((Prompt("steal bread"),), (Prompt("bake bread"),)),
        PhraseJudge(None),
        "asked",
    )
    anchors = Anchors(tuple(f"steal {n}" for n in range(40)), tuple(f"bake {n}" for n in range(40)))
    part = deal(anchors, [Prompt(f"paint {n}") for n in range(40)])["select"]
    batches = {**comparison_batches(vlm.model, folder), **comparison(vlm.model, folder)}
    return {
        "measured": list(behaviour.kinds),
        "recorded": list(record(behaviour)["groups"]),
        "judged": list(judge_guard(behaviour, behaviour).p_values),
        "scored": list(extract(vlm, anchors.head(4), [0]).auc),
        "fitted": list(examples(vlm, part, [0], "fit")[0].harmful),
        "compared": {
            name: hashlib.sha256(batch["pixel_values"].numpy().tobytes()).hexdigest()
            for name, batch in batches.items()
            if "pixel_values" in batch
        },
    }


def test_a_new_kind_is_one_row_and_graphs_are_compared_on_what_they_were(tiny_folder: Path, tmp_path: Path) -> None:
    source = SOURCE.read_text("utf-8")
    assert source.count(END) == 1
    (tmp_path / "image_kinds.py").write_text(source.replace(END, f"    {ROW},\n{END}"), "utf-8")
    program = f"""
import importlib.util, json, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
spec = importlib.util.spec_from_file_location({image_kinds.__name__!r}, {str(tmp_path / "image_kinds.py")!r})
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
from pathlib import Path
from {Path(__file__).stem} import selections
print(json.dumps(selections(Path({str(tiny_folder)!r}))))
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    before, after = selections(tiny_folder), json.loads(finished.stdout.splitlines()[-1])
    assert before["compared"].keys() == {"image", "images"}
    assert after.pop("compared") == before.pop("compared")
    assert after == {name: [*kinds, "stripes"] for name, kinds in before.items()}
