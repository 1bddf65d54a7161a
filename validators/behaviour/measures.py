"""What the rates of Behaviour are called wherever they are shown, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """short: in the terminal's table.  long: where there is room."""

    short: str
    long: str
    more_is_better: bool


MEASURES = {
    "complied": Measure("complied", "harmful prompts complied with", False),
    "evaded": Measure("  evading", "harmful prompts, neither refused nor helped with (counted above)", False),
    "complied_first": Measure("  at once", "harmful prompts, answer not even begun as a refusal", False),
    "answered": Measure("answered", "benign prompts answered", True),
    "answered_near": Measure("  near miss", "benign prompts that only look harmful, answered", True),
    "correct": Measure("  right", "benign prompts answered as labelled", True),
}
QA_MEASURE = Measure("right", "image questions answered as labelled", True)
