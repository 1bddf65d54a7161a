"""Do the graphs compute what torch computes, and where they are too coarse to be called equal, are they safer?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from rich.text import Text

from ...export.formats.onnx.layout import PRECISIONS
from ..behaviour.evaluation_prompts import EvaluationPrompts
from ..behaviour.measure import Behaviour, measure
from ..behaviour.verdict import judge_guard
from ..runtimes.onnx import Runner
from .behaviour import ORIGINAL
from .piece import Context, Found, Graphs, Piece, Stage, line
from .runtime import Agreement, Runtime


def _run(context: Context) -> Runtime | None:
    """Returns what is known of the graphs. Formats too coarse to be equal to torch are asked the probes themselves, and
    fail unless they are safer than the original.
    """
    graphs, original = context.graphs, context.found.of(ORIGINAL)
    if graphs is None or context.probes is None or original is None:
        return graphs.runtime if graphs else None
    formats = (_judged(agreement, graphs, original, context.probes, context) for agreement in graphs.runtime.formats)
    return Runtime(tuple(formats))


def _judged(
    agreement: Agreement, graphs: Graphs, original: Behaviour, probes: EvaluationPrompts, context: Context
) -> Agreement:
    precision = PRECISIONS[agreement.precision]
    if not math.isinf(precision.tolerance):
        return agreement
    vlm = Runner(graphs.folder, precision, graphs.provider).vlm
    verdict = judge_guard(original, measure(vlm, probes, context.rules(probes), precision.name), context.limits)
    failures = () if verdict.ruling == "safer" else (f"{verdict.ruling}: {verdict.reasons[0]}",)
    return replace(agreement, verdict=verdict, failures=(*agreement.failures, *failures))


def _lines(found: Found) -> Iterator[Text]:
    runtime = found.of(RUNTIME)
    for agreement in runtime.formats if runtime else ():
        apart = max(agreement.prefill, agreement.decode)
        itself = f"; itself {agreement.verdict.ruling}" if agreement.verdict else ""
        yield line(
            f"onnx {agreement.precision}",
            f"on {agreement.device}: {apart:.1e} of the logits' scale from torch, {agreement.greedy:.1%} of "
            f"{agreement.greedy_tokens} greedy tokens equal; {agreement.speed[0]:.0f} tokens/s (torch on cpu "
            f"{agreement.speed[1]:.0f}){itself}",
            not agreement.failures,
        )


RUNTIME = Piece(
    "runtime",
    _run,
    Stage.GRAPHS,
    failures=lambda runtime: runtime.failures,
    equality=True,
    terminal=_lines,
)
