"""A server in a process of its own, on 127.0.0.1, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

STARTUP = 180


@contextmanager
def running(command: Sequence[str | Path], log: Path, **environment: str) -> Iterator[str]:
    """`command --host H --port P`, up (/health) and then ended; gives http://H:P.  log: what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen([*command, *place], stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        for _ in range(2 * STARTUP):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
