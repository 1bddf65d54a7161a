"""What this process may use of the machine: a container gives it fewer processors and less memory than there are."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")
CPU_INFO = Path("/proc/cpuinfo")


def processors(groups: Path = GROUPS, own: Path = OWN_GROUP) -> int:
    """Returns how many processors this process may keep busy: those it may run on, and no more than its groups' share
    of time (a quota of 1.5 processors counts as 2).
    """
    shares = [len(os.sched_getaffinity(0))]
    for place in _places(groups, own, "cpu"):
        parts = _numbers(place / "cpu.cfs_quota_us") + _numbers(place / "cpu.cfs_period_us")
        for quota in (_numbers(place / "cpu.max"), parts):
            if len(quota) == 2 and min(quota) > 0:  # of time, and the period that it is a share of
                shares.append(math.ceil(quota[0] / quota[1]))
    return max(1, min(shares))


def free_memory(groups: Path = GROUPS, own: Path = OWN_GROUP, memory: Path = MEMORY) -> int:
    """Returns bytes that this process can take yet: what the machine has left, and no more than its groups have."""
    left = [sys.maxsize]  # where nothing tells
    with suppress(OSError):
        lines = memory.read_text().splitlines()
        left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for place in _places(groups, own, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limits, uses = _numbers(place / limit), _numbers(place / used)
            if limits and uses:
                left.append(limits[0] - uses[0])
    return max(0, min(left))


def _places(groups: Path, own: Path, controller: str) -> Iterator[Path]:
    """Returns the folders that tell of this process's groups, innermost first, of version 2 and of version 1; in a
    container some are not there.
    """
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, names, path = line.split(":", 2)
            root = groups / controller if names else groups
            if not names or controller in names.split(","):
                inside = root / path.lstrip("/")
                yield from (
                    parent for parent in (inside, *inside.parents) if parent.is_relative_to(root) and parent.is_dir()
                )


def _numbers(path: Path) -> list[int]:
    """Returns the numbers that a file of a group begins with; none where it is missing or says "max"."""
    with suppress(OSError, ValueError):
        return [int(word) for word in path.read_text().split()]
    return []


@cache
def multiplies_bfloat16() -> bool:
    """Returns whether the CPU has matrix units for bfloat16 (AMX): products are then several times as fast as in
    float32. Without them they are slower.
    """
    try:
        return " amx_bf16 " in CPU_INFO.read_text()
    except OSError:  # no Linux
        return False
