"""What a preset is: a guard by name, made outright or chosen in rounds among candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..fitting.directions import Directions
from ..fitting.material import Material
from ..interventions import Candidate, Intervention
from .layers import Scope


@dataclass(frozen=True)
class Round:
    """Candidates to choose among, given what the round before chose (None in the first).

    name: of the guard that is chosen if this round's best is taken.  what: for the progress bar.
    """

    name: str
    what: str
    candidates: Callable[[Material, Candidate | None], Iterable[Candidate]]


@dataclass(frozen=True)
class Preset:
    """A guard by name.

    help: one line.  makes: the interventions that it may consist of, so that a format that cannot hold one of them says
    so before a model is run.  rounds: how it is chosen.  insists: whether the last round's choice is taken even where
    an earlier one refuses more.  outright: scope -> what makes the guard where nothing is to be chosen, and the
    directions that it was made from.
    """

    name: str
    help: str
    makes: tuple[type[Intervention], ...]
    rounds: tuple[Round, ...] = ()
    insists: bool = False
    outright: Mapping[Scope, Callable[[Material], tuple[Candidate, Directions]]] = field(default_factory=dict)

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes that it has; its rounds choose among guards of scope sublayers."""
        return tuple(dict.fromkeys([*(("sublayers",) if self.rounds else ()), *self.outright]))
