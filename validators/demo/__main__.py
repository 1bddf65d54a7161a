"""`python -m guardfold.validators.demo --seed N --output DIR`: train the demo from a seed, measure it, keep it."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from .build import new_model, new_processor
from .calibrate import GAP_STEPS, open_gap
from .files import write_demo_card, write_demo_json, write_rows
from .lessons import Lessons
from .measure import figures, missed
from .speech import Voice
from .train import TRAINING_STEPS, Tick, TrainingError, align, connect, look, pretrain, tower
from .world import World

SEEDS = range(2**32)


class Parser(argparse.ArgumentParser):
    """Errors on one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        self.exit(2, f"error: {message}\n")


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m guardfold.validators.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the world and the weights (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo at --output")
    given = parser.parse_args()
    output = given.output.resolve()
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        parser.error("the demo's tokenizer needs sentencepiece and protobuf: pip install 'guardfold[demo]'")
    if given.seed not in SEEDS:
        parser.error(f"--seed {given.seed}: 0 to {SEEDS[-1]} needed")
    if not output.parent.is_dir():
        parser.error(f"no folder {output.parent}")
    if output.exists() and not given.overwrite:
        parser.error(f"{output} exists: choose another --output, or add --overwrite")
    if output.exists() and not (output / "demo.json").is_file():
        parser.error(f"{output} is not a demo, so it is not overwritten")
    disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            found = _with_progress(given.seed, made)
            if output.exists():
                output.rename(Path(scratch) / "replaced")
            made.rename(output)
    except (TrainingError, OSError) as problem:
        sys.exit(f"error: seed {given.seed}: {problem}")
    print(f"{output}: {found}")


def build(seed: int, folder: Path, tick: Tick) -> dict[str, object]:
    """Train the demo of `seed` into the empty `folder` and return its figures. May raise TrainingError."""
    torch.manual_seed(seed)
    world, processor = World.from_seed(seed), new_processor(folder)
    model, voice, lessons = new_model(processor), Voice(processor), Lessons(world, processor)
    pretrain(model, voice, lessons, tick)
    align(model, voice, lessons, tick)
    look(model, lessons, tick)
    with torch.no_grad():
        features, unseen = tower(model, lessons.gallery.pixels), tower(model, lessons.unseen.pixels)
    connect(model, voice, lessons, features, unseen, tick)
    open_gap(model, processor, voice, lessons, features, unseen, tick)
    model.half().save_pretrained(folder)
    write_rows(world, folder)
    write_demo_json(world, {}, folder)
    found = figures(folder)
    if misses := missed(found):
        raise TrainingError("; ".join(misses))
    write_demo_json(world, found, folder)
    write_demo_card(folder)
    return found


def _with_progress(seed: int, folder: Path) -> dict[str, object]:
    """Returns `build`, under one bar that grows when a stage needs more steps than planned."""
    planned = sum(TRAINING_STEPS.values()) + GAP_STEPS
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("drawing pictures", total=planned)

        def tick(stage: str) -> None:
            progress.update(task, description=stage, advance=1)
            progress.update(task, total=max(planned, progress.tasks[0].completed + 1))

        return build(seed, folder, tick)


if __name__ == "__main__":
    main()
