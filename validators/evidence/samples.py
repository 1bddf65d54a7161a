"""What do the answers look like? A few prompts, and what both models said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape

from ...guard.prompts.image_kinds import IMAGE_KINDS, ImageKind
from ..behaviour.evaluation_prompts import EvaluationPrompts
from ..behaviour.measure import Behaviour
from ..report.markup import row, section
from .behaviour import GUARDED, ORIGINAL
from .piece import Context, Piece, Stage, View

COUNT = 10
SNIPPET = 100
"""Characters kept of an answer to a harmful prompt."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models said; of harmful prompts only the beginning of the answers."""

    kind: ImageKind
    text: str
    harmful: bool
    original: str
    guarded: str


def sampled(probes: EvaluationPrompts, original: Behaviour, guarded: Behaviour) -> Iterator[Sample]:
    """Takes COUNT prompts, harmful and benign in turn, over all image kinds and probes; cuts harmful answers short."""
    prompts = [*probes.harmful, *probes.benign]
    for index in range(COUNT):
        harmful = index % 2 == 0
        first, count = (0, len(probes.harmful)) if harmful else (len(probes.harmful), len(probes.benign))
        place = first + (index // 2) * count // (COUNT // 2)
        kind = IMAGE_KINDS[index // 2 % len(IMAGE_KINDS)]
        before, after = (behaviour.kinds[kind].answers[place] for behaviour in (original, guarded))
        cut = SNIPPET if harmful else None
        yield Sample(kind, prompts[place].text, harmful, before[:cut], after[:cut])


def _run(context: Context) -> tuple[Sample, ...] | None:
    original, guarded = context.found.of(ORIGINAL), context.found.of(GUARDED)
    if context.probes is None or original is None or guarded is None:
        return None
    return tuple(sampled(context.probes, original, guarded))


def _section(view: View) -> Iterator[str]:
    samples = view.figures.get("samples")
    if not samples:
        return
    rows = [row(["image", "prompt", "original", "guarded"], "th", 9)]
    for sample in samples:
        texts = (sample[name] + (" ..." if sample["harmful"] else "") for name in ("original", "guarded"))
        label = f'{escape(sample["text"])} <span class="dim">{"harmful" if sample["harmful"] else "benign"}</span>'
        rows.append(row([escape(sample["kind"]), label, *(escape(text) for text in texts)], numbers_from=9))
    yield section("Side by side", f"<table>{''.join(rows)}</table>")


SIDE_BY_SIDE = Piece(
    "samples",
    _run,
    Stage.RESULTS,
    figures=lambda samples: [asdict(sample) for sample in samples],
    absent=[],
    page=_section,
)
