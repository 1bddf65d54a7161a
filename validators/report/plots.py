"""The report's pictures, as SVG text: bars of compliance, states along the steering direction, detector scores."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GREY, BLUE, OCHRE, RED, GREEN = "#8a94a6", "#1f6feb", "#c9a227", "#c0392b", "#2e8b57"
PLOT_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "guardfold",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e7ec",
    "axes.axisbelow": True,
}

Drawn = TypeVar("Drawn", str, bytes)
Rates = Mapping[str, Mapping[str, Mapping[str, float]]]


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=144, bbox_inches="tight", metadata={"Software": None})
    return data.getvalue()


def compliance_bars(behaviours: Mapping[str, Rates], kinds: Sequence[str]) -> str:
    """Harmful prompts complied with, in percent, per image kind, with Wilson 95 % intervals.

    behaviours: name -> image kind -> "complied" -> rate, low, high in [0, 1]; drawn in this order.
    """
    return _compliance_bars(behaviours, kinds, _svg)


def compliance_picture(behaviours: Mapping[str, Rates], kinds: Sequence[str]) -> bytes:
    """Returns the same as PNG, which model cards show wherever they are read."""
    return _compliance_bars(behaviours, kinds, _png)


def _compliance_bars(behaviours: Mapping[str, Rates], kinds: Sequence[str], drawn: Callable[[Figure], Drawn]) -> Drawn:
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 2.9))
        axes = figure.subplots()
        width = 0.8 / len(behaviours)
        for place, (name, rates) in enumerate(behaviours.items()):
            cells = [rates[kind]["complied"] for kind in kinds]
            heights = [100 * cell["rate"] for cell in cells]
            below = [100 * max(0.0, cell["rate"] - cell["low"]) for cell in cells]
            above = [100 * max(0.0, cell["high"] - cell["rate"]) for cell in cells]
            at = [index + (place - (len(behaviours) - 1) / 2) * width for index in range(len(kinds))]
            colour = {"original": GREY, "guarded": BLUE}.get(name, OCHRE)
            axes.bar(at, heights, width * 0.92, yerr=[below, above], label=name, color=colour, capsize=2.5)
        axes.set_xticks(range(len(kinds)), list(kinds))
        axes.set_ylim(0, 100)
        axes.set_ylabel("complied with, %")
        axes.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.16))
        return drawn(figure)


def direction_strips(projections: Mapping[str, Mapping[str, Sequence[float]]], layer: int) -> str:
    """Where harmful and benign prompts lie along the safety steering direction, one row per image kind."""
    with mpl.rc_context({**PLOT_STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.2, 0.6 + 0.52 * len(projections)))
        axes = figure.subplots()
        for row, (_, groups) in enumerate(projections.items()):
            for offset, (name, colour) in ((0.13, ("harmful", RED)), (-0.13, ("benign", GREEN))):
                values = list(groups[name])
                label = name if row == 0 else None
                axes.scatter(values, [-row + offset] * len(values), s=11, alpha=0.35, color=colour, lw=0, label=label)
                axes.scatter([sum(values) / len(values)], [-row + offset], s=70, marker="|", color=colour)
        axes.set_yticks([-row for row in range(len(projections))], list(projections))
        axes.set_xlabel(f"component of the last prompt token's state along the direction, layer {layer}")
        axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.22))
        return _svg(figure)


def detector_histogram(scores: Mapping[str, Sequence[float]], thresholds: Mapping[str, float]) -> str:
    """Draws detector scores of held-out prompts per group, and the thresholds t0 and t1 that a gate opens between."""
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 2.7))
        axes = figure.subplots()
        everything = [value for values in scores.values() for value in values]
        low, high = (end([*everything, *thresholds.values()]) for end in (min, max))
        edges = [low + (high - low) * step / 50 for step in range(51)]
        harmful = [name for name in scores if name.startswith("harmful")]
        for name, values in scores.items():
            shade = 1.0 - 0.6 * (harmful.index(name) / max(1, len(harmful))) if name in harmful else 1.0
            colour = RED if name in harmful else GREEN if name.startswith("harmless") else GREY
            axes.hist(values, edges, histtype="stepfilled", alpha=0.28 * shade, color=colour)
            axes.hist(values, edges, histtype="step", color=colour, alpha=shade, label=name)
        if thresholds:
            axes.axvspan(*thresholds.values(), color="#f0d98c", alpha=0.35, lw=0, label="gate opening")
        for name, value in thresholds.items():
            axes.axvline(value, color="#7a5c00", lw=1)
            axes.annotate(name, (value, axes.get_ylim()[1]), ha="center", va="bottom", fontsize=8.5)
        axes.set_xlabel("detector score u.x")
        axes.set_ylabel("held-out positions")
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.2))
        return _svg(figure)


def trade_off(
    tried: Sequence[Mapping[str, Any]], confirmed: Sequence[Mapping[str, Any]], taken: Mapping[str, Any]
) -> str:
    """Draws what candidates do with harmful prompts against what they cost: each by its first decisions, those that
    answered in full on top, and the one that was taken.

    All have refusal, text_refusal, new_refusals and near_refusals, in [0, 1].
    """
    styles = (
        (tried, {"color": GREY, "s": 14, "alpha": 0.6, "label": "first decisions"}),
        (confirmed, {"color": BLUE, "s": 26, "label": "whole answers"}),
        ([taken], {"facecolors": "none", "edgecolors": RED, "s": 90, "linewidths": 1.5, "label": "taken"}),
    )
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 2.9))
        for axes, cost, title in zip(
            figure.subplots(1, 2, sharey=True), ("new_refusals", "near_refusals"), ("benign", "near-miss"), strict=True
        ):
            for rows, style in styles:
                refused = [50 * (row["refusal"] + row["text_refusal"]) for row in rows]
                axes.scatter([100 * row[cost] for row in rows], refused, **style)
            axes.set_xlabel(f"{title} prompts newly refused, %")
        figure.axes[0].set_ylabel("harmful prompts refused, %")
        figure.axes[0].legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.16))
        return _svg(figure)


def edits_per_layer(layers: Mapping[str, Mapping[str, int]]) -> str:
    """Returns how many tensors were edited in each layer, by what kind of edit."""
    with mpl.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 2.2))
        axes = figure.subplots()
        kinds = sorted({kind for counts in layers.values() for kind in counts})
        base = [0] * len(layers)
        for kind, colour in zip(kinds, (BLUE, OCHRE, GREEN, RED), strict=False):
            counts = [layer.get(kind, 0) for layer in layers.values()]
            axes.bar(range(len(layers)), counts, 0.75, bottom=base, label=kind, color=colour)
            base = [below + count for below, count in zip(base, counts, strict=True)]
        step = max(1, len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), list(layers)[::step])
        axes.set_ylabel("tensors edited")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.22))
        return _svg(figure)
