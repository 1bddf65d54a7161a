"""How much memory untrusted numbers may take before anything contradicts them."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_limited(more: int) -> Iterator[None]:
    """While the block runs, allocations fail beyond what this process has mapped already and `more` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = mapped + more if limits[0] == resource.RLIM_INFINITY else min(mapped + more, limits[0])
    resource.setrlimit(resource.RLIMIT_AS, (wanted, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
