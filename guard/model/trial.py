"""Processors are foreign files, and some are programs: chat templates, which transformers runs in a sandbox, and the
rules of tokenizers. This bounds what they take.

A processor is tried once, before it is used, in a process of its own: one that has no lock, no open file and no device
of this process, and ends with it, or by itself when its time is up. It is forked from an interpreter that was started
for that, has imported what processors need and does nothing else (trial_server.py).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from ..base.errors import InputError
from ..base.remote_code import trusted
from .processor_files import digest_of
from .trial_server import (
    ENDED,
    ENDLESS,
    EXHAUSTED,
    LOADING,
    LOADING_BYTES,
    LOADING_SECONDS,
    MAX_CHARACTERS,
    MEMORY_BYTES,
    PACKET_BYTES,
    STARTING_SECONDS,
    Request,
)

SECONDS = 10.0
"""That a processor has for one short question."""

IDLE_SECONDS = 120.0
"""After which an interpreter that nobody asks anything ends: it holds 0.3 GB."""

_sound: set[bytes] = set()
"""Digests of processors that this process has tried already."""


class Exhausting(InputError):  # noqa: N818
    """A processor that takes more time or memory, or says more, than any sound one does."""


@contextmanager
def trying(folder: Path) -> Iterator[Callable[[], None]]:
    """Tries the processor in `folder` while the block runs, once a process for the same files.

    What the block gets waits for the end of that: InputError that begins with `folder` unless the processor loads and
    takes a short question, alone and with a picture; Exhausting if it does not within its bounds.
    """
    digest = digest_of(folder)
    if digest in _sound:
        yield lambda: None
        return
    with _trial(Request(str(folder), SECONDS, trusted())) as outcome:

        def end() -> None:
            _judge(folder, *outcome())
            _sound.add(digest)

        yield end


@dataclass(frozen=True)
class _Server:
    """The interpreter of trial_server.py, and the socket that it reads requests from: it ends when nobody holds it."""

    process: subprocess.Popen[bytes]
    requests: socket.socket


_server: _Server | None = None
"""That of this process; processes forked from it share it."""


def _start() -> _Server:
    command = [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.trial_server", str(IDLE_SECONDS)]
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nowhere = subprocess.DEVNULL
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=nowhere, stderr=nowhere, env=environment)
    return _Server(process, ours)


@contextmanager
def _trial(request: Request) -> Iterator[Callable[[], tuple[int, str]]]:
    """A trial in a process that is gone when the block ends, however it ends.

    What the block gets waits for its end: the status it ended with, and all that it wrote.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(STARTING_SECONDS + LOADING_SECONDS + request.seconds)
    with ours:
        with theirs:
            server = _sent(request, theirs)
        outcome = cache(lambda: _outcome(ours, server))
        try:
            yield outcome
        finally:
            ours.shutdown(socket.SHUT_WR)  # which ends the process, if it runs
            outcome()


def _sent(request: Request, answers: socket.socket) -> _Server:
    """Returns the server that has `request` now; a new one if that before has ended."""
    global _server
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)  # which `folder` may be relative to
    try:
        for server in (_server, None):
            with suppress(ConnectionError):
                _server = server or _start()
                socket.send_fds(_server.requests, [request.packed()], [answers.fileno(), here])
                break
    finally:
        os.close(here)
    assert _server
    return _server


def _outcome(answers: socket.socket, server: _Server) -> tuple[int, str]:
    written = b""
    for packet in iter(partial(answers.recv, PACKET_BYTES), b""):
        if packet.startswith(ENDED):
            return int(packet.removeprefix(ENDED)), written.decode(errors="replace")
        written += packet
    server.process.kill()  # it has ended, or what waits for the trial has
    return server.process.wait(), ""


def _judge(folder: Path, status: int, written: str) -> None:
    """Raises InputError for what a process that ended with `status` found, if it found anything."""
    *begun, complaint = written.split("\n")
    if not begun:
        raise InputError(f"{folder}: its processor cannot be tried: {sys.executable} ends with status {status}")
    loading = begun[-1] == LOADING
    seconds, size = (LOADING_SECONDS, LOADING_BYTES) if loading else (SECONDS, MEMORY_BYTES)
    what, over = f"{folder}: its {begun[-1]}", "to load" if loading else "for one short question"
    if status == -signal.SIGALRM:
        raise Exhausting(f"{what} takes over {seconds:.0f} seconds {over}")
    if status == EXHAUSTED:
        raise Exhausting(f"{what} takes over {size >> 20} MB {over}")
    if status == ENDLESS:
        raise Exhausting(f"{what} makes over {MAX_CHARACTERS} characters of one short question")
    if status < 0:
        raise Exhausting(f"{what} is ended by {signal.Signals(-status).name} on one short question")
    if status:
        raise InputError(complaint or f"{what} fails (status {status})")
