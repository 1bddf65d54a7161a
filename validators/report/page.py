"""report.html: the evidence as one self-contained page. No script, no request, nothing that is not in the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from ...guard.prompts.image_kinds import IMAGE_KINDS
from ..behaviour.measures import MEASURES, QA_MEASURE, equality, shown
from .plots import compliance_bars, detector_histogram, direction_strips, edits_per_layer

Figures = Mapping[str, Any]

COLOURS = {"safer": "#1a7f37", "not safer": "#b42318", "undecided": "#9a6700"}

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2433; background: #f6f7f9; margin: 0; }
main { max-width: 58rem; margin: 2rem auto; padding: 0 1rem; }
section { background: #fff; border: 1px solid #e1e5eb; border-radius: 10px; padding: 1rem 1.4rem; margin: 1rem 0; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: .2rem 0 .6rem; }
.verdict { display: inline-block; color: #fff; border-radius: 6px; padding: .15rem .7rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #edf0f3; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.better { color: #1a7f37; } .worse { color: #b42318; } .dim { color: #667085; font-size: 13px; }
svg { max-width: 100%; height: auto; } code { font-size: 13px; }
"""


def render_page(title: str, figures: Figures, guard: Figures, edits: Figures) -> str:
    """The page as text.

    figures: Evidence.figures().  guard: the guard's provenance, and its description under "interventions".
    edits: layer (or "other") -> kind of edit -> number of tensors.
    """
    parts = list(_sections(title, figures, guard, edits))
    head = f'<meta charset="utf-8"><title>{escape(title)}, guarded</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{"".join(parts)}</main></body></html>\n'


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _sections(title: str, figures: Figures, guard: Figures, edits: Figures) -> Iterator[str]:
    ruling = figures["ruling"]
    reasons = (figures.get("verdict") or {}).get("reasons", [])
    colour = COLOURS.get(ruling, "#667085")
    yield (
        f"<section><h1>{escape(title)}, guarded</h1>"
        f'<p>Verdict: <span class="verdict" style="background:{colour}">{escape(ruling)}</span></p>'
        f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in reasons)}</ul>{_soundness(figures)}</section>"
    )
    behaviours = shown(figures)
    if behaviours:
        yield _section(
            "Compliance with harmful prompts",
            compliance_bars(behaviours, IMAGE_KINDS),
            _note("Lower is safer. Bars are Wilson 95 % intervals. Two-pass: the published method, as hooks."),
        )
        yield _section("All rates", _table(behaviours))
    effects = figures.get("effects") or {}
    if effects.get("projections"):
        yield _section(
            "Harmful and benign prompts along the safety steering direction",
            direction_strips(effects["projections"], effects["layer"]),
            _note(
                "Each dot is a prompt in the original model, the tick their mean: what an image does to the distance."
            ),
        )
    gate = next((each for each in guard["interventions"] if each["kind"] == "gate"), None)
    if gate and guard.get("scores"):
        drawn = partial(detector_histogram, guard["scores"], gate["t0"], gate["t1"])
        yield from _told("The gate's detector", drawn, partial(_held_out, guard))
    if any(edits.values()):
        yield _section("Edited tensors per layer", edits_per_layer(edits))
    if guard.get("selection"):
        yield from _told("How the guard was chosen", partial(_selection, guard["selection"]))
    if figures.get("samples"):
        yield _section("Side by side", _samples(figures["samples"]))
    yield _section(
        "Limits",
        "<p>These figures hold for these probes: short plain questions, greedy decoding. A guard in weights can be "
        "removed by whoever holds the weights and is not adversarially robust.</p>",
    )


def _told(title: str, *parts: Callable[[], str]) -> Iterator[str]:
    """A section of what a guard's provenance tells; none where it is not such as guardfold writes."""
    try:
        made = [part() for part in parts]
    except Exception:  # foreign JSON may fail in any way; without it there is nothing to show
        return
    yield _section(title, *made)


def _note(text: str) -> str:
    return f'<p class="dim">{escape(text)}</p>'


def _soundness(figures: Mapping[str, Any]) -> str:
    equal, whole = figures.get("equivalence"), figures["integrity"]
    lines = [f"{whole['identical']} tensors equal the original's byte for byte; {whole['edited']} were edited."]
    if equal:
        lines.append(equality(equal))
    return _note(" ".join(lines))


def _row(cells: Sequence[str], tag: str = "td", numbers_from: int = 2) -> str:
    shown = (f"<{tag}{' class=n' if at >= numbers_from else ''}>{cell}</{tag}>" for at, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}</tr>"


def _table(behaviours: Mapping[str, Any]) -> str:
    rows = [_row(["prompts", "measure", *behaviours, "n"], "th")]
    original = behaviours["original"]
    for kind, rates in original.items():
        for name, rate in rates.items():
            measure = QA_MEASURE if kind == "qa" else MEASURES[name]
            cells = [_rate(each[kind][name], rate, measure.more_is_better) for each in behaviours.values()]
            rows.append(_row([escape(kind), measure.long, *cells, str(rate["total"])]))
    return f"<table>{''.join(rows)}</table>"


def _rate(rate: Mapping[str, float], before: Mapping[str, float], more_is_better: bool) -> str:
    change = rate["rate"] - before["rate"]
    style = "" if abs(change) <= 0.005 else "better" if (change > 0) == more_is_better else "worse"
    interval = f'<span class="dim">{100 * rate["low"]:.0f} to {100 * rate["high"]:.0f}</span>'
    return f'<span class="{style}">{100 * rate["rate"]:.1f} %</span> {interval}'


def _held_out(guard: Mapping[str, Any]) -> str:
    found = guard["held_out"]
    rows = [_row(["", *map(escape, found["auc"])], "th", 1)]
    rows.append(_row(["AUC", *(f"{value:.3f}" for value in found["auc"].values())], numbers_from=1))
    rows.append(_row(["opens", *(f"{value:.1%}" for value in found["opens"].values())], numbers_from=1))
    elsewhere = ", ".join(f"{place} {share:.2%}" for place, share in found["fires_elsewhere"].items())
    clip = ", ".join(f"{float(beta):g}: {value:.1e}" for beta, value in found["distance_to_clip"].items())
    text = f"On anchors that it was neither fitted to nor chosen on. Fires elsewhere: {elsewhere} of positions. "
    text += f"Largest distance of its ramp to the ideal clip, by beta: {clip}."
    return f"<table>{''.join(rows)}</table>{_note(text)}"


def _selection(selection: Mapping[str, Any]) -> str:
    candidates = selection["candidates"]
    names = list(dict.fromkeys(name for row in candidates for name in row))
    rows = [_row([escape(name.replace("_", " ")) for name in names], "th", 0)]
    for row in candidates:
        cells = [_cell(row.get(name, "")) for name in names]
        line = _row(cells, numbers_from=0)
        rows.append(line.replace("<tr>", '<tr style="background:#eaf2ff">') if row == selection["chosen"] else line)
    return f'<p>{escape(selection["why"])}.</p><div style="overflow-x:auto"><table>{"".join(rows)}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    rows = [_row(["image", "prompt", "original", "guarded"], "th", 9)]
    for each in samples:
        texts = (each[name] + (" ..." if each["harmful"] else "") for name in ("original", "guarded"))
        label = f'{escape(each["text"])} <span class="dim">{"harmful" if each["harmful"] else "benign"}</span>'
        rows.append(_row([escape(each["kind"]), label, *(escape(text) for text in texts)], numbers_from=9))
    return f"<table>{''.join(rows)}</table>"
