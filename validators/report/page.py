"""report.html: the evidence as one self-contained page. No script, no request, nothing that is not in the file."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from ..evidence import EVIDENCE
from ..evidence.piece import JSON, View
from .markup import note, section

PAGE_COLOURS = {"safer": "#1a7f37", "not safer": "#b42318", "undecided": "#9a6700"}

CSS = """
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


SCOPE_NOTE = (
    "<p>These figures hold for these probes: short plain questions, greedy decoding. A guard in weights can be "
    "removed by whoever holds the weights and is not adversarially robust.</p>"
)


def render_page(title: str, figures: JSON, guard: JSON, edits: Mapping[str, Mapping[str, int]]) -> str:
    """Renders the page as text: the ruling, a section or more for each piece of evidence that has some, the limits.

    figures: Evidence.figures().  guard, edits: see View.
    """
    view = View(figures, guard, edits)
    sections = (part for piece in EVIDENCE.values() for part in piece.page(view))
    body = "".join([_ruling(title, figures), *sections, section("Limits", SCOPE_NOTE)])
    head = f'<meta charset="utf-8"><title>{escape(title)}, guarded</title><style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _ruling(title: str, figures: JSON) -> str:
    ruling = figures["ruling"]
    reasons = (figures.get("verdict") or {}).get("reasons", [])
    colour = PAGE_COLOURS.get(ruling, "#667085")
    sentences = (sentence for piece in EVIDENCE.values() for sentence in piece.page_head(figures))
    return (
        f"<section><h1>{escape(title)}, guarded</h1>"
        f'<p>Verdict: <span class="verdict" style="background:{colour}">{escape(ruling)}</span></p>'
        f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in reasons)}</ul>{note(' '.join(sentences))}</section>"
    )
