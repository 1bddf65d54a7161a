"""What the rates of Behaviour are called wherever they are shown, which way is better, and their Markdown table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """short: in the terminal's table.  long: where there is room."""

    short: str
    long: str
    more_is_better: bool


MEASURES = {
    "complied": Measure("complied", "harmful prompts complied with", False),
    "complied_first": Measure("  at once", "harmful prompts, answer not even begun as a refusal", False),
    "answered": Measure("answered", "benign prompts answered", True),
    "correct": Measure("  right", "benign prompts answered as labelled", True),
}
QA_MEASURE = Measure("right", "image questions answered as labelled", True)


_ROUNDING = {
    "repair": "with repair (a few entries by one step more, so that the projection survives the dtype)",
    "nearest": "to nearest",
}


def shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The behaviours that were measured, by the name under which they are shown, in that order."""
    named = {"original": "original", "guarded": "guarded", "two-pass": "reference"}
    return {name: figures[key] for name, key in named.items() if figures.get(key)}


def markdown(figures: Mapping[str, Any]) -> str:
    """Evidence.figures() as a model card says them: equality, then every rate with its interval."""
    return "\n\n".join(_paragraphs(figures))


def equality(equal: Mapping[str, Any]) -> str:
    """Equivalence.figures() in a sentence."""
    if equal["approximate"]:
        return (
            f"APPROXIMATE: {equal['approximate']}. Folded weights against the original with hooks: largest logit "
            f"difference {equal['exact']:.1e} of the logits' scale, where the guard itself changes {equal['edit']:.1e}."
        )
    return (
        f"Folded weights against the original with hooks: largest logit difference {equal['folded']:.1e} of the "
        f"logits' scale, where the guard itself changes {equal['edit']:.1e}."
    )


def _paragraphs(figures: Mapping[str, Any]) -> Iterator[str]:
    original, guarded, equal = (figures.get(name) for name in ("original", "guarded", "equivalence"))
    if equal:
        yield equality(equal)
        if equal["tensor_leak"] is not None:
            yield (
                f"Weights were rounded {_ROUNDING[equal['rounding']]}: of the projected directions, at most "
                f"{equal['tensor_leak']:.1e} is left in a tensor."
            )
    reasons = (figures.get("verdict") or {}).get("reasons", [])
    if reasons:
        yield "\n".join(f"- {reason}" for reason in reasons)
    if not original or not guarded:
        yield "Behaviour was not measured."
        return
    lines = ["| prompts | measure | original | guarded | n |", "|---|---|---|---|---|"]
    for kind, rates in original.items():
        for name, rate in rates.items():
            measure = QA_MEASURE if kind == "qa" else MEASURES[name]
            cells = (kind, measure.long, _interval(rate), _interval(guarded[kind][name]), str(rate["total"]))
            lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
    yield "Rates with Wilson 95 % intervals."


def _interval(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['rate']:.1f} % ({100 * rate['low']:.1f} to {100 * rate['high']:.1f})"
