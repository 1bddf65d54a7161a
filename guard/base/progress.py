"""One progress bar for everything that takes over a second, on standard error, gone when done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Tracked = TypeVar("Tracked")
CONSOLE = Console(stderr=True)


def bar() -> Progress:
    """Returns a progress display on standard error that leaves nothing behind, and shows nothing where that is no
    terminal.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal)


def track(items: Iterable[Tracked], what: str, total: int | None = None) -> Iterator[Tracked]:
    """Returns `items` one by one, under a progress bar named `what`."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with bar() as progress:
        yield from progress.track(items, total=total, description=what)


def batched(items: Sequence[Tracked], size: int, what: str) -> Iterator[Sequence[Tracked]]:
    """Returns `items` in batches of `size`, under a progress bar that counts items."""
    with bar() as progress:
        task = progress.add_task(what, total=len(items))
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            yield batch
            progress.advance(task, len(batch))


@contextmanager
def megabytes(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes, named `what`: to be called with the number of those just done."""
    with bar() as progress:
        task = progress.add_task(f"{what} (MB)", total=total >> 20)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done >> 20)

        yield advance
