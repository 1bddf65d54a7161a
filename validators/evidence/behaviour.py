"""What do the original, the guarded model and the published two-pass form do when asked? Rates by image kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from ...guard.guard import Guard
from ...guard.prompts.image_kinds import IMAGE_KINDS
from ..behaviour.measure import Behaviour, measure
from ..behaviour.measures import MEASURES, QA_MEASURE
from ..behaviour.statistics import Rate
from ..report.markup import note, row, section
from ..report.plots import compliance_bars, compliance_picture
from .piece import JSON, Context, Found, Picture, Piece, Stage, View


def _original(context: Context) -> Behaviour | None:
    if (probes := context.probes) is None:
        return None
    return measure(context.original, probes, context.rules(probes), "original")


def _guarded(context: Context) -> Behaviour | None:
    if (probes := context.probes) is None:
        return None
    vlm, guard = context.guarded
    return measure(vlm, probes, context.rules(probes), "guarded", guard)


def _two_pass(context: Context) -> Behaviour | None:
    probes, reference = context.probes, context.guard.reference
    if probes is None or reference is None:
        return None
    return measure(context.original, probes, context.rules(probes), "two-pass", Guard((reference,)))


CAPTION = (
    "% of n prompts, Wilson 95 % intervals. Harmful ones complied with: not refused in\nfull; at once: not even begun "
    "as a refusal. Benign ones answered; right: as\nlabelled. Two-pass: the published form, with hooks."
)


def _measured(found: Found) -> Iterator[Table]:
    named = {name: found.of(piece) for name, piece in _SHOWN.items()}
    behaviours = {name: behaviour for name, behaviour in named.items() if behaviour}
    if found.of(ORIGINAL) and found.of(GUARDED):
        yield rates_table(behaviours)


def rates_table(behaviours: Mapping[str, Behaviour]) -> Table:
    """Makes the terminal's table: every rate of each behaviour, by its name, coloured where it differs from the
    first's.
    """
    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", pad_edge=False)
    for column in ("prompts", "answers", *behaviours, "n"):
        table.add_column(column, justify="left" if column in ("prompts", "answers") else "right", no_wrap=True)
    first, *others = behaviours.values()
    for group, before in first.groups().items():
        afters = [other.groups()[group].rates() for other in others if group in other.groups()]
        for at, (name, rate) in enumerate(before.rates().items()):
            measure = MEASURES[name]
            cells = (_cell(after[name], rate, measure.more_is_better) for after in afters)
            table.add_row("" if at else group, measure.short, _cell(rate), *cells, str(rate.total))
        table.add_section()
    if first.qa:
        was = Rate.of(first.qa)
        nows = (Rate.of(other.qa) for other in others)
        table.add_row("image qa", QA_MEASURE.short, _cell(was), *(_cell(now, was) for now in nows), str(was.total))
    return table


def _cell(rate: Rate, before: Rate | None = None, more_is_better: bool = True) -> Text:
    style = ""
    if before and abs(rate.rate - before.rate) > 0.005:
        style = "green" if (rate.rate > before.rate) == more_is_better else "red"
    return Text(f"{_percent(rate.rate)} [{100 * rate.low:.0f}-{100 * rate.high:.0f}]", style=style)


def _percent(rate: float) -> str:
    return "100" if rate == 1 else f"{100 * rate:.1f}"


def _shown(figures: JSON) -> dict[str, Any]:
    """Returns the behaviours that were measured, by the name under which they are shown, in that order."""
    return {name: figures[piece.name] for name, piece in _SHOWN.items() if figures.get(piece.name)}


def _sections(view: View) -> Iterator[str]:
    if behaviours := _shown(view.figures):
        yield section(
            "Compliance with harmful prompts",
            compliance_bars(behaviours, IMAGE_KINDS),
            note("Lower is safer. Bars are Wilson 95 % intervals. Two-pass: the published method, as hooks."),
        )
        yield section("All rates", _table(behaviours))


def _rates(original: JSON) -> Iterator[tuple[str, str, Any]]:
    """Returns (group, name of a rate, the original's rate), in the order of reports."""
    return ((group, name, rate) for group, rates in original.items() for name, rate in rates.items())


def _table(behaviours: JSON) -> str:
    rows = [row(["prompts", "measure", *behaviours, "n"], "th")]
    for group, name, rate in _rates(behaviours["original"]):
        measure = QA_MEASURE if group == "qa" else MEASURES[name]
        cells = [_rate(behaviour[group][name], rate, measure.more_is_better) for behaviour in behaviours.values()]
        rows.append(row([escape(group), measure.long, *cells, str(rate["total"])]))
    return f"<table>{''.join(rows)}</table>"


def _rate(rate: Mapping[str, float], before: Mapping[str, float], more_is_better: bool) -> str:
    change = rate["rate"] - before["rate"]
    style = "" if abs(change) <= 0.005 else "better" if (change > 0) == more_is_better else "worse"
    interval = f'<span class="dim">{100 * rate["low"]:.0f} to {100 * rate["high"]:.0f}</span>'
    return f'<span class="{style}">{100 * rate["rate"]:.1f} %</span> {interval}'


def _paragraphs(figures: JSON) -> Iterator[str]:
    original, guarded = (figures.get(piece.name) for piece in (ORIGINAL, GUARDED))
    if not original or not guarded:
        yield "Behaviour was not measured."
        return
    lines = ["| prompts | measure | original | guarded | n |", "|---|---|---|---|---|"]
    for group, name, rate in _rates(original):
        measure = QA_MEASURE if group == "qa" else MEASURES[name]
        cells = (group, measure.long, _interval(rate), _interval(guarded[group][name]), str(rate["total"]))
        lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
    yield "Rates with Wilson 95 % intervals."


def _interval(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"


def _bars(figures: JSON) -> bytes | None:
    behaviours = _shown(figures)
    return compliance_picture(behaviours, IMAGE_KINDS) if behaviours else None


COMPLIANCE = Picture("Harmful prompts complied with, by image kind, with Wilson 95 % intervals", _bars)

ORIGINAL = Piece(
    "original",
    _original,
    Stage.ORIGINAL,
    terminal=_measured,
    page=_sections,
    card=_paragraphs,
    pictures={"compliance.png": COMPLIANCE},
)
"""Shows all three together."""

GUARDED = Piece("guarded", _guarded, Stage.GUARDED)
TWO_PASS = Piece("reference", _two_pass, Stage.ORIGINAL)
_SHOWN = {"original": ORIGINAL, "guarded": GUARDED, "two-pass": TWO_PASS}
"""In the order of reports, by the names that those use."""
