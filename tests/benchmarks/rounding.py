"""What repaired rounding costs, leaves behind, and does to weights: python tests/benchmarks/rounding.py [--runs 5]

A random down_proj [4096, 11008] and a quarter of an embedding [8192, 4096], read from one file and written to another
(in the page cache), folded along m directions and rounded in both ways in turns. Seconds are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from guardfold.export.checkpoint.edits import Folded, ProjectColumns, ProjectRows
from guardfold.export.checkpoint.memory import map_blocks_from
from guardfold.export.checkpoint.rewrite import LARGE_BYTES
from guardfold.export.checkpoint.rounding import Block, nearest, repaired
from guardfold.export.checkpoint.transfer import write_runs

SHAPES = {"down_proj": (4096, 11008), "embedding": (8192, 4096)}
WIDTH, RMS = 4096, 0.02
DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One tensor in a file, and the edit that projects it."""

    weight: Tensor
    basis: Tensor
    rows: bool
    source: int
    target: int

    def read(self, first: int, last: int) -> Tensor:
        size = self.weight[0].nbytes
        data = bytearray(os.pread(self.source, (last - first) * size, first * size))
        return torch.frombuffer(data, dtype=self.weight.dtype).reshape(last - first, -1)

    def folded(self) -> Folded:
        edit = ProjectRows(self.basis, 1.0) if self.rows else ProjectColumns(self.basis, 1.0)
        return Folded(self.read, self.weight.shape, [edit])

    def rounded(self, way: str) -> Iterator[Block]:
        dtype, axis = self.weight.dtype, 0 if self.rows else 1
        folded = self.folded()
        return nearest(folded, dtype) if way == "nearest" else repaired(folded, dtype, self.basis, axis)

    def written(self, way: str) -> float:
        """Seconds of CPU that reading, folding, rounding and writing take."""
        start = time.thread_time()
        for rows, runs in self.rounded(way):
            write_runs(self.target, rows, runs, self.weight[0].nbytes, 0)
        return time.thread_time() - start

    def off(self, way: str) -> tuple[float, float]:
        """(|V W'| / |V W|, |W' - exact|) of what `written` would write."""
        whole = torch.empty_like(self.weight)
        for rows, runs in self.rounded(way):
            for first, last, place in runs:
                whole[first:last] = rows[place : place + last - first]
        exact = self.folded().rows(0, len(whole)).double()
        left, had = (self.along(each) for each in (whole.double() - exact, self.weight.double()))
        return left / had, float((whole.double() - exact).norm())

    def along(self, weight: Tensor) -> float:
        return float(torch.tensordot(self.basis.double(), weight, ([1], [0 if self.rows else 1])).norm())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    map_blocks_from(LARGE_BYTES)
    print(
        "| tensor | dtype | m | nearest, CPU s | repair, CPU s | ratio | left by nearest | by repair | weight error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            weight = (RMS * torch.randn(shape)).to(dtype)
            with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
                write_runs(source.fileno(), weight, [(0, len(weight), 0)], weight[0].nbytes, 0)
                os.posix_fallocate(target.fileno(), 0, weight.nbytes)
                for rank in (1, 4, 8):
                    basis = torch.linalg.qr(torch.randn(WIDTH, rank))[0].T.contiguous()
                    case = Case(weight, basis, name == "down_proj", source.fileno(), target.fileno())
                    taken = [(case.written("nearest"), case.written("repair")) for _ in range(runs)]
                    plain, repair = map(statistics.median, zip(*taken, strict=True))
                    ratio = statistics.median(each / other for other, each in taken)
                    (before, error), (after, more) = case.off("nearest"), case.off("repair")
                    print(
                        f"| {name} | {str(dtype).removeprefix('torch.')} | {rank} | {plain:.3f} | {repair:.3f} "
                        f"| {ratio:.2f} | {before:.1e} | {after:.1e} | {more / error - 1:+.1%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
