"""Few cases instead of a product: those that try every combination of the properties that act on one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Case = TypeVar("Case")


def covering(possible: Iterable[Case], tried: Callable[[Case], set[object]]) -> list[Case]:
    """Cases of `possible` that together try all that any of them does: always the one with most that is new."""
    combinations = [(case, tried(case)) for case in possible]
    left, taken = set[object]().union(*(combined for _, combined in combinations)), list[Case]()
    while left:
        case, combined = max(combinations, key=lambda entry: len(entry[1] & left))
        taken.append(case)
        left -= combined
    return taken
