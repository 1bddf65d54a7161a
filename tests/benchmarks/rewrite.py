"""The rewriter against cp and against what scripts do: python tests/benchmarks/rewrite.py --sizes 1 5 14

Random checkpoints of LLaVA-1.5-7B's shapes in bfloat16; the projection edits o_proj and down_proj of every layer (28 %
of 14 GB). Each way runs in a process of its own, from start to fsync, in turns (A B C ... A B C ...), so that a busy
moment meets all of them; ratios are within a turn, and cp stands in every turn twice: the second is the null control.
Warm: the source was just read. Cold: the page cache was dropped. With --write, its tables go into BENCHMARKS.md in
place of earlier ones of the same size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tests/benchmarks/rewrite.py writes from here -->", "<!-- to here -->"
ABOUT = f"""## The rewriter

`python tests/benchmarks/rewrite.py`, medians (and ranges) of runs in turns; {os.cpu_count()} cores. Random checkpoints
of LLaVA-1.5-7B's shapes, `o_proj` and `down_proj` of every layer projected. Every way runs from the start of its
process, imports included, until its files are on the disk. The ratio is to `cp` in the same turn; `cp` again is the
control."""
SIZES = {1: (1, 2), 5: (9, 24), 14: (32, 24)}
"""About this many GB -> (text layers, vision layers)."""

COPY, CONTROL = "cp + sync", "cp + sync, again"
OURS = "guardfold"
WAYS = {
    COPY: "cp",
    CONTROL: "cp",
    OURS: "repair",
    "guardfold --rounding nearest": "nearest",
    "guardfold, its imports alone": "imports",
    "load_file, edit, save_file per shard": "shards",
    "from_pretrained, edit, save_pretrained": "pretrained",
}
SLOW = tuple(WAYS)[-2:]
"""Ways that --slow-runs can leave out of the later turns."""

WRITERS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Run:
    """Seconds by the clock, seconds of CPU (user and system), and peak resident memory in MiB."""

    wall: float
    cpu: float
    peak: float


def guardfold(source: Path, target: Path, guard: Path, way: str) -> None:
    """What `guardfold export` does between extraction and checks: fold, rewrite, sync, publish."""
    from guardfold.export.checkpoint.companions import copy_companions
    from guardfold.export.checkpoint.headers import Checkpoint
    from guardfold.export.checkpoint.rewrite import Writing, rewrite
    from guardfold.export.checkpoint.staging import staging
    from guardfold.export.families.table import family_of
    from guardfold.export.fold import fold
    from guardfold.guard.guard import Guard

    if way == "imports":
        return
    checkpoint = Checkpoint.open(source)
    family = family_of(checkpoint)
    edits = fold(Guard.load(guard), family, checkpoint.shapes)
    how = Writing(rounding="repair" if way == "repair" else "nearest", link="none")
    with staging(target, False) as stage:
        rewrite(checkpoint, family, edits, stage, lambda _: None, how)
        copy_companions(source, stage)


def shards(source: Path, target: Path, guard: Path, _: str) -> None:
    """A file at a time through memory, as merging tools do."""
    from safetensors.torch import load_file, save_file

    basis = _basis(guard)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in sorted(source.glob("*.safetensors")):
        held = load_file(path)
        for name in held:
            if name.endswith(WRITERS) and "language_model" in name:
                held[name] = _projected(held[name], basis)
        save_file(held, target / path.name, {"format": "pt"})


def pretrained(source: Path, target: Path, guard: Path, _: str) -> None:
    """The whole model in memory, as scripts do that ablate directions."""
    import torch
    from transformers import AutoModelForImageTextToText

    basis = _basis(guard)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(WRITERS) and "language_model" in name:
            parameter.data = _projected(parameter.data, basis)
    model.save_pretrained(target, max_shard_size="2GB")


def _basis(guard: Path) -> Any:
    from guardfold.guard.guard import Guard

    return next(iter(Guard.load(guard).interventions[0].tensors().values())).float()


def _projected(weight: Any, basis: Any) -> Any:
    wide = weight.float()
    return (wide - basis.T @ (basis @ wide)).to(weight.dtype)


DONE: dict[str, Callable[[Path, Path, Path, str], None]] = {
    "repair": guardfold,
    "nearest": guardfold,
    "imports": guardfold,
    "shards": shards,
    "pretrained": pretrained,
}


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measured(way: str, source: Path, target: Path, guard: Path) -> Run:
    """One run of `way` in a process of its own."""
    if way == "cp":
        command = ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(target)]
    else:
        command = [sys.executable, __file__, "--do", way, str(source), str(target), str(guard)]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{way} failed with {process.returncode}")
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def prepare(source: Path, cold: bool) -> None:
    """Puts the source's pages out of the cache, or into it."""
    os.sync()
    drop = Path("/proc/sys/vm/drop_caches")
    if cold and os.access(drop, os.W_OK):
        drop.write_text("3")
    for path in source.iterdir():
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and file.read(2**24):
                pass


def turns(
    source: Path, scratch: Path, guard: Path, runs: int, slow_runs: int, cold: bool, ways: dict[str, str]
) -> dict[str, list[Run]]:
    """Way -> its runs, one in each turn (SLOW ones: in the first `slow_runs`); every turn begins with another way."""
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for turn in range(runs):
        names = [name for name in ways if turn < slow_runs or name not in SLOW]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            prepare(source, cold)
            target = scratch / "out"
            found[name].append(measured(ways[name], source, target, guard))
            shutil.rmtree(target, ignore_errors=True)
        said = ", ".join(f"{name} {found[name][-1].wall:.1f}" for name in names)
        print(f"  turn {turn + 1} of {runs}: {said}", flush=True)
    return found


def table(found: dict[str, list[Run]]) -> list[str]:
    """A Markdown table: medians, with ranges of the time and of the ratio to cp in the same turn."""
    lines = ["", "| way | wall s | / cp | CPU s | peak MiB |", "|---|---|---|---|---|"]
    for name, runs in ((name, runs) for name, runs in found.items() if runs):
        ratios = [run.wall / copy.wall for run, copy in zip(runs, found[COPY], strict=False)]
        wall = _spread([run.wall for run in runs], ".1f")
        cpu, peak = (statistics.median(getattr(run, key) for run in runs) for key in ("cpu", "peak"))
        lines.append(f"| {name} | {wall} | {_spread(ratios, '.2f')} | {cpu:.1f} | {peak:.0f} |")
    for name in SLOW:
        if found.get(name):
            ratio = statistics.median(o.wall / run.wall for o, run in zip(found[OURS], found[name], strict=False))
            lines += ["", f"guardfold takes {ratio:.2f} of the time of: {name} ({len(found[name])} runs)."]
    return [*lines, ""]


def _spread(numbers: list[float], form: str) -> str:
    return f"{statistics.median(numbers):{form}} ({min(numbers):{form}} to {max(numbers):{form}})"


def write(tables: dict[str, list[str]]) -> None:
    """Puts tables, by title, into BENCHMARKS.md in place of those of the same titles that it has between the marks."""
    path = Path(__file__).parents[2] / "BENCHMARKS.md"
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    blocks = [block.split("\n") for block in written.strip().split("\n### ")[1:]]
    all_tables = {"### " + first: lines for first, *lines in blocks} | tables
    in_order = sorted(all_tables, key=lambda title: (float(title.split()[1]), title))
    body = "\n\n".join("\n".join([title, *all_tables[title]]).strip() for title in in_order)
    path.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{ABOUT}\n\n{body}\n\n{END}{after or chr(10)}", "utf-8")


def main() -> None:
    """The command line."""
    if sys.argv[1:2] == ["--do"]:
        way, (model, output, made) = sys.argv[2], map(Path, sys.argv[3:])
        DONE[way](model, output, made, way)
        sync(output)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--slow-runs", type=int, help="of the last two ways; default: as many as of the others")
    parser.add_argument("--page-cache", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--scratch", type=Path, help="a folder with room for two copies")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(WAYS.values()), help="ways to leave out")
    parser.add_argument("--write", action="store_true", help="write the section of BENCHMARKS.md")
    given = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if way not in given.skip}
    tables = {}
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
            source, guard = Path(scratch) / "model", Path(scratch) / "guard.safetensors"
            count = make_model(source, guard, size)
            for cache in given.page_cache:
                title = f"### {count / 1e9:.1f} GB, {cache}"
                print(title, flush=True)
                slow = given.runs if given.slow_runs is None else given.slow_runs
                found = turns(source, Path(scratch), guard, given.runs, slow, cache == "cold", ways)
                tables[title] = table(found)
                print("\n".join(tables[title]), flush=True)
    if given.write:
        write(tables)


def make_model(folder: Path, guard: Path, size: int) -> int:
    """Writes a checkpoint of about `size` GB and a guard for all its layers, in a child; returns its size in bytes."""
    layers, vision = SIZES[size]
    code = (
        "import sys, torch; from pathlib import Path; from memory import make;"
        "from guardfold.guard.guard import Guard; from guardfold.guard.interventions import SublayerProjection;"
        f"make(Path(sys.argv[1]), {layers}, {vision}); v = torch.nn.functional.normalize(torch.randn(1, 4096));"
        f"Guard((SublayerProjection(dict.fromkeys(range({layers}), v)),)).save(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(guard)], check=True, cwd=Path(__file__).parent)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
