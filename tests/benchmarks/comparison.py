"""What it costs to hold a folder to what plain transformers loads: python tests/benchmarks/comparison.py [--layers 1]

Makes a random LLaVA-1.5-shaped checkpoint (bf16; 1.0 GB with one layer and two of the tower), guards it by projecting
one layer, and times, in turns in one process with everything in the page cache: the comparison of untouched bytes that
was all there was before (source against result), the comparison of the source with what transformers loads from it, and
the whole of `inspect_folder` on the result, which holds it to both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory import make

from guardfold.export.checkpoint.companions import copy_companions
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.validators.evidence.integrity import _same_bytes, inspect_folder
from guardfold.validators.evidence.loaded import check_loaded


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="a folder with room for two copies")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch)
        making = multiprocessing.get_context("spawn").Process(target=make, args=(folder / "model", given.layers, 2))
        making.start()
        making.join()
        source = Checkpoint.open(folder / "model")
        family, basis = family_of(source), torch.nn.functional.normalize(torch.randn(1, 4096))
        made = fold(Guard((SublayerProjection({given.layers - 1: basis}),)), family, source.shapes, source.read)
        (folder / "out").mkdir()
        rewrite(source, family, made, folder / "out", lambda _count: None)
        copy_companions(source.folder, folder / "out")
        result = Checkpoint.open(folder / "out")
        untouched = sorted(set(source.tensors) - made.changed)

        def bytes_alone() -> None:
            assert all(_same_bytes(source, name, result, name) for name in untouched)

        ways: dict[str, Callable[[], object]] = {
            "before: untouched bytes of source and result": bytes_alone,
            "source, as transformers loads it": lambda: check_loaded(source),
            "result, both": lambda: inspect_folder(source, result, family, made),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.runs + 1):  # the first of them warms up
            for name, way in ways.items():
                wall, used = time.perf_counter(), time.process_time()
                way()
                taken[name].append((time.perf_counter() - wall, time.process_time() - used))
        print(f"{source.data_bytes / 1e9:.2f} GB\n\n| compared | wall s | CPU s |\n|---|---|---|")
        for name, each in taken.items():
            wall, used = (statistics.median(column) for column in zip(*each[1:], strict=True))
            print(f"| {name} | {wall:.2f} | {used:.2f} |")


if __name__ == "__main__":
    main()
