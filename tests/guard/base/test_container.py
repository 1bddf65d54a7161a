"""Processors and memory as a container leaves them, read from control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guardfold.guard.base.container import free_memory, processors

ALLOWED = len(os.sched_getaffinity(0))
GIB = 2**30


def group(tmp_path: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """(where groups are, what says which is this process's) with the given contents."""
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "own").write_text(own)
    return root, tmp_path / "own"


QUOTAS: dict[str, tuple[str, dict[str, str], float]] = {
    "version 2": ("0::/job\n", {"job/cpu.max": "100000 100000\n"}, 1),
    "version 2, none": ("0::/job\n", {"job/cpu.max": "max 100000\n"}, ALLOWED),
    "version 2, one above it": ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
    "version 2, seen from inside": ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),
    "version 2, elsewhere": ("0::/a\n", {"other/cpu.max": "20000 100000\n"}, ALLOWED),
    "version 1": (
        "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        1,
    ),
    "version 1, none": (
        "4:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        ALLOWED,
    ),
    "nothing to read": ("", {}, ALLOWED),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_processors_are_those_of_the_container(tmp_path: Path, kind: str) -> None:
    own, files, count = QUOTAS[kind]
    assert processors(*group(tmp_path, own, files)) == count


def test_a_share_of_a_processor_counts_as_one(tmp_path: Path) -> None:
    wide = group(tmp_path, "0::/\n", {"cpu.max": f"{int((ALLOWED - 0.5) * 1e5)} 100000\n"})
    assert processors(*wide) == ALLOWED


def test_no_more_processors_than_the_process_may_run_on() -> None:
    one = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, one)
    try:
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_memory_is_what_the_container_has_left(tmp_path: Path) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
    limits = {"memory.max": str(3 * GIB), "memory.current": str(GIB)}
    assert free_memory(*group(tmp_path, "0::/\n", limits), machine) == 2 * GIB
    limits["memory.max"] = "max"
    assert free_memory(*group(tmp_path, "0::/\n", limits), machine) == 8 * GIB
    old = {"memory/memory.limit_in_bytes": str(2 * GIB), "memory/memory.usage_in_bytes": str(3 * GIB)}
    assert free_memory(*group(tmp_path, "5:memory:/\n", old), machine) == 0


def test_where_nothing_tells_of_memory_there_is_no_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path / "own", tmp_path / "meminfo") > 2**40
    own, files, machine = "0::/\n", {"memory.max": str(3 * GIB), "memory.current": str(GIB)}, tmp_path / "meminfo"
    assert free_memory(*group(tmp_path, own, files), machine) == 2 * GIB
