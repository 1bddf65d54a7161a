"""A piece of evidence is an object in a registry: run once, in order, shown everywhere, and able to stop an export."""

from __future__ import annotations

import gc
import json
import weakref
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from gates import save_guard
from rich.console import Console
from zoo import random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection, TwoPass
from guardfold.guard.prompts.prompts import Prompt
from guardfold.pipeline import GuardOptions, NotSafer, export_guarded
from guardfold.validators.behaviour.evaluation_prompts import EvaluationPrompts
from guardfold.validators.evidence import EVIDENCE
from guardfold.validators.evidence.evidence import examine_hooked, gather
from guardfold.validators.evidence.piece import Context, Picture, Piece, Stage
from guardfold.validators.report.page import render_page
from guardfold.validators.report.terminal import render
from guardfold.validators.runtimes import opened
from guardfold.validators.runtimes.opened import Opened

DIRECTION = SublayerProjection({1: random_basis(1, 32)})
PIECE = Piece(
    "curvature",
    lambda context: len(context.source.tensors),
    label="curvature",
    figures=lambda count: {"count": count},
    summary=lambda count: f"{count} bends",
    page_head=lambda figures: [f"Bends: {figures['curvature']['count']}."],
    page=lambda view: [f"<section><h2>Curvature</h2>{view.figures['curvature']['count']}</section>"],
    card_head=lambda figures: ["Curvature was measured."],
    card=lambda figures: [f"{figures['curvature']['count']} bends in all."],
    pictures={"curvature.png": Picture("Bends", lambda figures: b"drawn")},
)


@pytest.fixture
def guard_file(tmp_path: Path) -> str:
    return str(save_guard(tmp_path, DIRECTION))


def register(monkeypatch: pytest.MonkeyPatch, piece: Piece[Any]) -> None:
    monkeypatch.setitem(EVIDENCE, piece.name, piece)


def shown(evidence: Any) -> str:
    console = Console(width=200, file=StringIO(), record=True)
    console.print(render(evidence))
    return console.export_text()


def test_the_order_of_a_report() -> None:
    assert [name for name, piece in EVIDENCE.items() if piece.run] == [
        "integrity",
        "equivalence",
        "runtime",
        "original",
        "guarded",
        "reference",
        "effects",
        "coherence",
        "verdict",
        "distance_to_reference",
        "samples",
        "outcomes",
    ]


def test_what_is_registered_is_run_and_shown_everywhere(
    model: Path, guard_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, PIECE)
    made = export_guarded(str(model), tmp_path / "out", GuardOptions(guard=guard_file), skip_behaviour=True)
    count = len(Checkpoint.open(model).tensors)
    assert made.evidence.sound and made.evidence.curvature == count
    report = json.loads((made.folder / "report.json").read_text())
    assert report["curvature"] == {"count": count}
    assert f"curvature    {count} bends" in shown(made.evidence)
    page, card = ((made.folder / name).read_text() for name in ("report.html", "README.md"))
    assert f" Bends: {count}.</p>" in page and "<h2>Curvature</h2>" in page
    assert card.index("Curvature was measured.") < card.index("Behaviour was not measured.") < card.index("in all.")
    assert "![Bends](guardfold/curvature.png)" in card
    assert (made.folder / "guardfold" / "curvature.png").read_bytes() == b"drawn"


def test_a_failure_stops_the_search_and_the_export(
    model: Path, guard_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(
        monkeypatch, Piece("bent", lambda context: 3, label="bent", failures=lambda n: (f"{n} bends",), figures=int)
    )
    register(monkeypatch, Piece("later", lambda context: pytest.fail("was run"), figures=int))
    with pytest.raises(NotSafer, match=r"^not sound: 3 bends; nothing was written$") as error:
        export_guarded(str(model), tmp_path / "out", GuardOptions(guard=guard_file), allow_weaker=True)
    assert not (tmp_path / "out").exists()
    found = error.value.evidence
    assert found.reasons == ("3 bends",) and found.later is None and found.original is None
    assert found.figures()["bent"] == 3 and found.figures()["later"] is None
    assert "\nverdict      NOT MEASURED\n  - 3 bends" in shown(found)


def test_without_anything_that_shows_equality_nothing_is_sound(model: Path) -> None:
    found = examine_hooked(Checkpoint.open(model), Guard((DIRECTION,)), None)
    assert found.integrity.passed and not found.failures and not found.sound
    with pytest.raises(AttributeError, match="curvature"):
        _ = found.curvature


def test_what_was_found_is_not_looked_for_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def finds(name: str, what: str | None) -> Piece[str]:
        def run(_context: Context) -> str | None:
            ran.append(name)
            return what

        return Piece(name, run, figures=str)

    register(monkeypatch, finds("once", "found"))
    register(monkeypatch, finds("anew", None))
    first = gather(Context(Checkpoint.open(model), Guard((DIRECTION,))))
    again = gather(first.context)
    assert first.once == again.once == "found"
    assert ran == ["once", "anew", "anew"]


def test_each_model_is_opened_once_and_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = opened.load

    def watched(folder: Path) -> Any:
        gc.collect()
        assert not [one for one in loaded if one() is not None]
        vlm = load(folder)
        loaded.append(weakref.ref(vlm.model))
        return vlm

    monkeypatch.setattr(opened, "load", watched)
    checkpoint, prompt = Checkpoint.open(model), (Prompt("how to walk ?"),)
    guard = Guard((DIRECTION,), reference=TwoPass({1: random_basis(1, 32)}))
    found = examine_hooked(checkpoint, guard, EvaluationPrompts(prompt, prompt))
    assert found.effects.projections and found.reference and found.guarded and found.samples
    assert len(loaded) == 1
    gc.collect()
    assert loaded[0]() is None
    models = Opened()
    assert models(checkpoint) is models(checkpoint)
    models(Checkpoint.open(model))
    assert len(loaded) == 3


def test_models_are_asked_stage_by_stage_whatever_the_order_of_reports(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Stage] = []
    for stage in reversed(Stage):

        def run(_context: Context, stage: Stage = stage) -> None:
            ran.append(stage)

        register(monkeypatch, Piece(stage.name, run, stage))
    gather(Context(Checkpoint.open(model), Guard((DIRECTION,))))
    assert ran == list(Stage)


def test_the_page_shows_what_a_linear_gate_does_on_held_out_anchors() -> None:
    held_out = {"auc": {"text": 1.0, "shape": 0.97}, "opens": {"shape": [0.91, 0.2], "everything else": [0.01, 0.1]}}
    figures = {"ruling": "not measured", "integrity": {"identical": 1, "edited": 1}}
    page = render_page("model", figures, {"interventions": [{"kind": "linear-gate"}], "held_out": held_out}, {})
    section = page[page.index("<h2>The gate&#x27;s detector</h2>") :]
    for shown_once in ("0.970", "0.91 &plusmn; 0.20", "0.01 &plusmn; 0.10", "everything else"):
        assert section.count(shown_once) == 1
    assert "Fires elsewhere" not in section and "<svg" not in section
