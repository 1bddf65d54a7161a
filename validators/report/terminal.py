"""Evidence as a person reads it: tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...export.checkpoint.headers import Checkpoint
from ...export.families.table import Family
from ...guard.guard import Guard
from ..behaviour.measure import Behaviour
from ..behaviour.verdict import Verdict
from ..evidence import EVIDENCE
from ..evidence.behaviour import rates_table
from ..evidence.evidence import Evidence
from ..evidence.piece import line

TERMINAL_COLOURS = {"safer": "green", "not safer": "red", "undecided": "yellow"}


def render(evidence: Evidence) -> RenderableType:
    """Renders what each piece of evidence has to say, in the order of reports, then the ruling with its reasons."""
    lines = (part for piece in EVIDENCE.values() for part in piece.lines(evidence.found))
    return Group(*lines, *_ruling(evidence.ruling, evidence.reasons))


def render_served(behaviours: Mapping[str, Behaviour], verdict: Verdict | None) -> RenderableType:
    """Renders the table of a served model, beside its baseline if there is one, and the ruling if there is one."""
    return Group(rates_table(behaviours), *(_ruling(verdict.ruling, verdict.reasons) if verdict else ()))


def _ruling(ruling: str, reasons: Sequence[str]) -> Iterator[RenderableType]:
    yield line("verdict", ruling.upper(), style=f"bold {TERMINAL_COLOURS.get(ruling, 'yellow')}")
    for reason in reasons:
        yield Text(f"  - {reason}")


def directions_table(guard: Guard) -> Table:
    """Per layer: how far harmful and harmless lie apart along v_1, and how well it ranks them under each image kind."""
    figures = guard.provenance["directions"]
    kinds = list(figures["auc"])
    table = Table(caption="gap in units of the residual stream; AUC cross-fitted over halves of the anchors")
    for column in ("layer", "gap", "s1/s2", *(f"AUC {kind}" for kind in kinds)):
        table.add_column(column, justify="right")
    for layer, gap in figures["gap"].items():
        first, second = figures["singular_values"][layer][:2]
        scores = (f"{figures['auc'][kind][layer]:.3f}" for kind in kinds)
        table.add_row(layer, f"{gap:.3g}", f"{first / second:.2f}", *scores)
    return table


def family_table(checkpoint: Checkpoint, family: Family) -> RenderableType:
    """Returns what a model is, and its residual writers by role: number, dtypes, an example, what edits them."""
    table = Table()
    for column in ("writes to the residual stream", "tensors", "dtype", "for example", "edited by scope"):
        table.add_column(column, justify="right" if column == "tensors" else "left")
    for role in dict.fromkeys(writer.role for writer in family.writers):
        writers = [writer for writer in family.writers if writer.role == role]
        dtypes = sorted({checkpoint.info(writer.disk).dtype for writer in writers})
        scopes = "shared, sublayers" if writers[0].layer is not None else "shared"
        table.add_row(role, str(len(writers)), " ".join(dtypes), writers[0].disk, scopes)
    facts = {
        "family": f"{family.model_type} around {family.text_model_type}",
        "layers": family.layers,
        "hidden size": family.width,
        "weights": f"{checkpoint.data_bytes / 1e6:.1f} MB in {len(checkpoint.shards)} file(s)",
        "head": f"tied to {family.embedding}" if family.tied else f"its own tensor, {family.head}; never edited",
        "scope sublayers": "exact",
        "scope shared": family.verdict,
        "not read here": "the weights' values; export refuses NaN, Inf and what transformers would load otherwise",
        "gates": f"{len(family.mlps)} of {family.layers} layers have a dense MLP or shared expert that holds one",
    }
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        summary.add_row(name, str(value))
    return Group(summary, table)
