"""What is known of the guard itself: what it edits, and how it was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from html import escape
from typing import Any

from ..report.markup import row, section, section_if_sound
from ..report.plots import edits_per_layer, trade_off
from .piece import Piece, View


def _sections(view: View) -> Iterator[str]:
    if any(view.edits.values()):
        yield section("Edited tensors per layer", edits_per_layer(view.edits))
    if selection := view.guard.get("selection"):
        parts = (partial(part, selection) for part in (_trade_off, _selection))
        yield from section_if_sound("How the guard was chosen", *parts)


def _trade_off(selection: Mapping[str, Any]) -> str:
    """Returns the plot; nothing for guards of a version that did not keep it."""
    tried = selection.get("trade_off")
    return trade_off(tried, selection["candidates"], selection["chosen"]) if tried else ""


def _selection(selection: Mapping[str, Any]) -> str:
    candidates = selection["candidates"]
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate))
    rows = [row([escape(name.replace("_", " ")) for name in names], "th", 0)]
    for candidate in candidates:
        line = row([_cell(candidate.get(name, "")) for name in names], numbers_from=0)
        chosen = candidate == selection["chosen"]
        rows.append(line.replace("<tr>", '<tr style="background:#eaf2ff">') if chosen else line)
    told = f"<p>{escape(selection['why'])}.{_apart(selection)}</p>"
    return f'{told}<div style="overflow-x:auto"><table>{"".join(rows)}</table></div>'


def _apart(selection: Mapping[str, Any]) -> str:
    """Returns what each intervention does alone, in one line; nothing where there was one only."""
    if not selection.get("apart"):
        return ""
    decided = {"original": selection["original"], **selection["apart"]}
    told = "; ".join(
        f"{escape(name)} {figures['refusal']:.0%} and {figures['text_refusal']:.0%}"
        for name, figures in decided.items()
    )
    return f" Harmful anchors refused, by first decisions, with pictures and without: {told}."


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else escape(str(value))


PROVENANCE: Piece[None] = Piece("provenance", page=_sections)
