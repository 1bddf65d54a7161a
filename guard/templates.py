"""Chat templates are programs that others wrote. transformers runs them in a sandbox; this bounds what they take.

A template is tried once, in a child process, before it is used. The child ends by itself when its time is up, and holds
no file open but its pipe: should its parent be killed, no folder stays locked for it.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from .errors import InputError

SECONDS = 10.0
MEMORY_BYTES = 512 * 2**20
MAX_CHARACTERS = 2**20
"""Of what a template may make of a question of two words."""

EXHAUSTED, ENDLESS = 3, 4
"""Exit statuses of the child."""


def check_template(processor: ProcessorMixin, where: Path) -> None:
    """InputError that begins with `where` unless the chat template renders two short turns within its bounds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _render_and_exit(processor, writer)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader, errors="replace") as said:
        reason = " ".join(said.read(1000).split())
    if status == -signal.SIGALRM:
        raise InputError(f"{where}: its chat template takes over {SECONDS:.0f} seconds for one short question")
    if status == EXHAUSTED:
        raise InputError(f"{where}: its chat template takes over {MEMORY_BYTES >> 20} MB for one short question")
    if status == ENDLESS:
        raise InputError(f"{where}: its chat template makes over {MAX_CHARACTERS} characters of one short question")
    if status:
        raise InputError(f"{where}: its chat template fails ({reason or f'status {status}'})")


def _render_and_exit(processor: ProcessorMixin, writer: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _limit_time()
        _limit_memory()
        _close_all_but(writer)
        status = EXHAUSTED
        for picture in ([], [{"type": "image"}]):
            turn: Any = [{"role": "user", "content": [*picture, {"type": "text", "text": "How are"}]}]
            text: Any = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            if len(text) > MAX_CHARACTERS:
                os._exit(ENDLESS)
        status = 0
    except MemoryError:
        pass
    except BaseException as error:
        status = 1
        os.write(writer, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    finally:
        os._exit(status)


def _limit_time() -> None:
    """To SECONDS, then SIGALRM ends the process, whatever it is doing."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, SECONDS)


def _limit_memory() -> None:
    """To what this process has mapped already and MEMORY_BYTES more."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _close_all_but(kept: int) -> None:
    """Closes what was inherited, the standard streams and `kept` aside."""
    os.closerange(3, kept)
    os.closerange(max(3, kept + 1), os.sysconf("SC_OPEN_MAX"))
