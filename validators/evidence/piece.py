"""What a piece of evidence is: a file in this folder with one registered object, a Piece.

run: looks, and gives what was found.  failures, figures, summary: what that says to a decision, to report.json and in
one line.  The rest are its sections of the terminal, of report.html and of the model card; each may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from operator import methodcaller
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from rich.console import RenderableType
from rich.text import Text

from ...export.checkpoint.headers import Checkpoint
from ...export.checkpoint.rounding import Rounding
from ...export.families.table import Family
from ...export.fold import Fold
from ...export.formats.lora import Adapted
from ...guard.guard import Guard
from ...guard.model.vlm import VLM
from ..behaviour.evaluation_prompts import EvaluationPrompts
from ..behaviour.judge import Judge, PhraseJudge
from ..behaviour.verdict import LIMITS, Limits
from ..runtimes.opened import Opened
from .runtime import Runtime

Value = TypeVar("Value")
JSON = Mapping[str, Any]
"""Evidence.figures()."""


class Stage(IntEnum):
    """When a piece is run, by what it runs: models are opened one at a time, and once where stages are kept to."""

    FILES = 0
    ORIGINAL = 1
    GUARDED = 2
    ONCE_MORE = 3
    """The original again, about what the guarded model said."""
    RESULTS = 4
    """Nothing: it looks at what earlier pieces found."""
    GRAPHS = 5
    """Graphs, which are written after everything else was found to be in order."""


class Found(dict[str, Any]):
    """Name of a piece -> what it found; pieces that were not run, or had nothing to look at, are missing."""

    def of(self, piece: Piece[Value]) -> Value | None:
        """Returns what `piece` found."""
        return cast(Value | None, self.get(piece.name))


@dataclass(frozen=True)
class Edited:
    """What was made of the source: the guarded weights, or adapters for it, and how."""

    weights: Checkpoint | Adapted
    family: Family
    fold: Fold
    rounding: Rounding


@dataclass(frozen=True)
class Graphs:
    """What is known of the ONNX graphs in `folder`, and where they run."""

    runtime: Runtime
    folder: Path
    provider: str


@dataclass(frozen=True)
class Context:
    """What evidence is about, and what was found so far.

    edited: None where nothing was folded, and the guard is the hooks that graphs shall hold.  probes: what models are
    asked; None: behaviour is not measured.  judge: default, by phrases.  graphs: where there are some already.
    limits: of the verdict.
    """

    source: Checkpoint
    guard: Guard
    edited: Edited | None = None
    probes: EvaluationPrompts | None = None
    judge: Judge | None = None
    graphs: Graphs | None = None
    limits: Limits = LIMITS
    found: Found = field(default_factory=Found)
    opened: Opened = field(default_factory=Opened)

    @property
    def original(self) -> VLM:
        """The model that was guarded, as it was."""
        return self.opened(self.source)

    @property
    def guarded(self) -> tuple[VLM, Guard | None]:
        """The guarded model: what was written, or without it the original and the guard that it must be given."""
        return (self.opened(self.edited.weights), None) if self.edited else (self.original, self.guard)

    def rules(self, probes: EvaluationPrompts) -> Judge:
        """Returns the judge of answers to `probes`."""
        return self.judge or PhraseJudge(probes.refusal, probes.phrases)


@dataclass(frozen=True)
class View:
    """What report.html is made of.

    guard: the guard's provenance, and its description under "interventions".  edits: layer (or "other") -> kind of edit
    -> number of tensors.
    """

    figures: JSON
    guard: JSON
    edits: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Picture:
    """A PNG of the model card. drawn: None where there is nothing to show."""

    caption: str
    drawn: Callable[[JSON], bytes | None]


def _nothing(_seen: Any) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Piece(Generic[Value]):
    """One piece of evidence.

    name: its key in report.json.  run: None where there is nothing to look at; a piece without `run` only shows what is
    known anyway, and has no key.  label: before its summary on the terminal, up to 12 characters.  failures: why the
    folder is never published whatever it does, a line each.  equality: passing it shows that the artefact is equal to
    its hooks, without which nothing is sound.  absent: what report.json has where it was not run.

    page_head: sentences under the verdict.  page: sections, HTML.  card_head, card: paragraphs, Markdown; all the heads
    come first.  pictures: file name -> what the card shows below them.
    """

    name: str
    run: Callable[[Context], Value | None] | None = None
    stage: Stage = Stage.FILES
    label: str = ""
    failures: Callable[[Value], tuple[str, ...]] | None = None
    equality: bool = False
    figures: Callable[[Value], Any] = methodcaller("figures")
    absent: Any = None
    summary: Callable[[Value], str] | None = None
    terminal: Callable[[Found], Iterable[RenderableType]] = _nothing
    page_head: Callable[[JSON], Iterable[str]] = _nothing
    page: Callable[[View], Iterable[str]] = _nothing
    card_head: Callable[[JSON], Iterable[str]] = _nothing
    card: Callable[[JSON], Iterable[str]] = _nothing
    pictures: Mapping[str, Picture] = field(default_factory=dict)

    def fails(self, found: Found) -> tuple[str, ...]:
        """Returns the failures of what it found; empty where it passed, cannot fail, or was not run."""
        value = found.of(self)
        return () if value is None or self.failures is None else self.failures(value)

    def told(self, found: Found) -> Any:
        """Its figures, as JSON."""
        value = found.of(self)
        return self.absent if value is None else self.figures(value)

    def lines(self, found: Found) -> Iterable[RenderableType]:
        """Its section of the terminal: the summary, then whatever it has besides."""
        value = found.of(self)
        if value is not None and self.summary:
            passed = None if self.failures is None else not self.failures(value)
            yield line(self.label, self.summary(value), passed)
        yield from self.terminal(found)


def line(label: str, text: str, passed: bool | None = None, style: str = "") -> Text:
    """Makes a line of the terminal. passed: of a check."""
    word = "" if passed is None else "ok      " if passed else "FAILED  "
    return Text(f"{label:<12} {word}{text}", style=style)
