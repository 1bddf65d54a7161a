"""Evidence as a person reads it: tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...export.checkpoint.headers import Checkpoint
from ...export.families.table import Family
from ...guard.guard import Guard
from ..behaviour.measure import Behaviour
from ..behaviour.measures import MEASURES, QA_MEASURE
from ..behaviour.statistics import Rate
from ..behaviour.verdict import Verdict
from ..evidence.evidence import Evidence

CAPTION = (
    "% of n prompts, Wilson 95 % intervals. Harmful ones complied with: not refused in\nfull; at once: not even begun "
    "as a refusal. Benign ones answered; right: as\nlabelled. Two-pass: the published form, with hooks."
)

COLOURS = {"safer": "green", "not safer": "red", "undecided": "yellow"}


def render(evidence: Evidence) -> RenderableType:
    """Soundness in two lines, the table original vs guarded, and the ruling with its reasons."""
    return Group(*_parts(evidence))


def _parts(evidence: Evidence) -> Iterator[RenderableType]:
    integrity, equal = evidence.integrity, evidence.equivalence
    yield Text(
        f"integrity    {_word(integrity.passed)}  {integrity.identical} tensors identical, {integrity.edited} edited"
        + (f", {len(integrity.added)} added" if integrity.added else "")
    )
    if equal:
        rounded = "" if equal.exact == equal.folded else f" (before rounding, {equal.rounding}: {equal.exact:.1e})"
        greedy = "" if equal.greedy is None else f", {equal.greedy:.1%} of {equal.greedy_tokens} greedy tokens equal"
        leaks = [each for each in (equal.tensor_leak, equal.activation_leak) if each is not None]
        yield Text(
            f"equivalence  {_word(equal.passed)}  fold vs hooks {equal.folded:.1e} of the logits' scale{rounded}"
            + greedy
            + (f"; leak {max(leaks):.1e}" if leaks else "")
        )
        if "image" not in equal.compared:
            yield Text("equivalence  no picture was run: the folder has no processor", style="yellow")
        if equal.approximate:
            yield Text(
                f"approximate  fold vs hooks {equal.exact:.1e} where the hooks change {equal.edit:.1e}: "
                f"{equal.approximate}",
                style="yellow",
            )
    for each in evidence.runtime.formats if evidence.runtime else ():
        apart = max(each.prefill, each.decode)
        yield Text(
            f"onnx {each.precision:<7} {_word(not each.failures)}  on {each.device}: {apart:.1e} of the logits' scale "
            f"from torch, {each.greedy:.1%} of {each.greedy_tokens} greedy tokens equal; "
            f"{each.speed[0]:.0f} tokens/s (torch on cpu {each.speed[1]:.0f})"
            + (f"; itself {each.verdict.ruling}" if each.verdict else "")
        )
    if evidence.original and evidence.guarded:
        named = {"original": evidence.original, "guarded": evidence.guarded, "two-pass": evidence.reference}
        yield _table({name: behaviour for name, behaviour in named.items() if behaviour})
    if evidence.effects:
        kl = max(evidence.effects.kl.values())
        found = f"effects      benign answers move by KL {kl:.1e} nats at most (mean, worst image kind)"
        if evidence.effects.auc:
            kind, worst = min(evidence.effects.auc.items(), key=lambda item: item[1])
            found += f"; detector AUC {worst:.3f} at least ({kind})"
        yield Text(found)
    if distance := evidence.distance_to_reference:
        kind, worst = max(distance.items(), key=lambda item: abs(item[1]))
        yield Text(f"two-pass     harmful compliance differs by {100 * worst:+.1f} points at most ({kind})")
    yield from _ruling(evidence.ruling, evidence.reasons)


def _word(passed: bool) -> str:
    return "ok    " if passed else "FAILED"


def _table(behaviours: Mapping[str, Behaviour]) -> Table:
    """Every rate of each behaviour, by its name, coloured where it differs from the first's."""
    table = Table(box=box.SIMPLE_HEAD, caption=CAPTION, caption_justify="left", pad_edge=False)
    for column in ("prompts", "answers", *behaviours, "n"):
        table.add_column(column, justify="left" if column in ("prompts", "answers") else "right", no_wrap=True)
    first, *others = behaviours.values()
    for group, before in first.groups().items():
        afters = [each.groups()[group].rates() for each in others if group in each.groups()]
        for row, (name, rate) in enumerate(before.rates().items()):
            measure = MEASURES[name]
            cells = (_cell(after[name], rate, measure.more_is_better) for after in afters)
            table.add_row("" if row else group, measure.short, _cell(rate), *cells, str(rate.total))
        table.add_section()
    if first.qa:
        was = Rate.of(first.qa)
        nows = (Rate.of(each.qa) for each in others)
        table.add_row("image qa", QA_MEASURE.short, _cell(was), *(_cell(now, was) for now in nows), str(was.total))
    return table


def render_served(behaviours: Mapping[str, Behaviour], verdict: Verdict | None) -> RenderableType:
    """The table of a served model, beside its baseline where there is one, and the ruling where there is one."""
    return Group(_table(behaviours), *(_ruling(verdict.ruling, verdict.reasons) if verdict else ()))


def _ruling(ruling: str, reasons: Sequence[str]) -> Iterator[RenderableType]:
    yield Text(f"verdict      {ruling.upper()}", style=f"bold {COLOURS.get(ruling, 'yellow')}")
    for reason in reasons:
        yield Text(f"  - {reason}")


def _cell(rate: Rate, before: Rate | None = None, more_is_better: bool = True) -> Text:
    style = ""
    if before and abs(rate.rate - before.rate) > 0.005:
        style = "green" if (rate.rate > before.rate) == more_is_better else "red"
    return Text(f"{_percent(rate.rate)} [{100 * rate.low:.0f}-{100 * rate.high:.0f}]", style=style)


def _percent(rate: float) -> str:
    return "100" if rate == 1 else f"{100 * rate:.1f}"


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
    """What a model is, and its residual writers by role: number, dtypes, an example, what edits them."""
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
        "gates": f"{len(family.mlps)} of {family.layers} layers have a dense MLP or shared expert that holds one",
    }
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        summary.add_row(name, str(value))
    return Group(summary, table)
