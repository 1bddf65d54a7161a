"""The HTML that sections of report.html are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape


def section(title: str, *parts: str) -> str:
    """Makes a section. title: plain text.  parts: HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def section_if_sound(title: str, *parts: Callable[[], str]) -> Iterator[str]:
    """Makes a section of what a guard's file tells; none where that is not such as guardfold writes."""
    try:
        made = [part() for part in parts]
    except Exception:  # foreign JSON may fail in any way; without it there is nothing to show
        return
    yield section(title, *made)


def note(text: str) -> str:
    """Makes a paragraph in small print of plain text."""
    return f'<p class="dim">{escape(text)}</p>'


def row(cells: Sequence[str], tag: str = "td", numbers_from: int = 2) -> str:
    """Makes a table's row of cells that are HTML, from `numbers_from` on aligned as numbers."""
    shown = (f"<{tag}{' class=n' if at >= numbers_from else ''}>{cell}</{tag}>" for at, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}</tr>"
