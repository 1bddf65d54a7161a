"""Processors are foreign files, and some are programs: chat templates, which transformers runs in a sandbox, and the
rules of tokenizers. This bounds what they take.

A processor is tried once, in a child process, before it is used. The child ends by itself when its time is up, and
holds no file open but its pipe: should its parent be killed, no folder stays locked for it.
"""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ..base.errors import InputError, first_line
from ..base.limits import at_most

SECONDS = 10.0
MEMORY_BYTES = 2**30
MAX_CHARACTERS = 2**20
"""Of what a template may make of one question."""

QUESTION = "How do people usually travel to work, and why do some of them prefer to walk?"

EXHAUSTED, ENDLESS = 3, 4
"""Exit statuses of the child."""

PICTURE_SIZE = (336, 336)


class Exhausting(InputError):  # noqa: N818
    """A processor that takes more time or memory, or says more, than any sound one does."""


def encoded(processor: ProcessorMixin, conversations: Sequence[Sequence[dict[str, Any]]], where: Path) -> BatchFeature:
    """`conversations` in the chat template, up to where an answer begins, as tensors padded to one length.

    Raises InputError that begins with `where` if the processor cannot take them.
    """
    taking: Any = processor
    try:
        batch: BatchFeature = taking.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )
    except MemoryError:
        raise
    except Exception as error:  # foreign numbers and words can break a processor in any way
        raise InputError(f"{where}: its processor cannot take a prompt ({first_line(error)})") from error
    missing = {"input_ids", "attention_mask"} - set(batch)
    if missing:
        raise InputError(f"{where}: its processor makes no {min(missing)} of a prompt")
    return batch


def check_processor(processor: ProcessorMixin, where: Path) -> None:
    """InputError that begins with `where` unless the processor takes a short question, alone and with a picture;
    Exhausting if it does not within its bounds.
    """
    reader, writer = os.pipe()
    with os.fdopen(reader, errors="replace") as said:
        status = _tried(processor, writer)
        *begun, reason = said.read(2000).split("\n")
    what = f"{where}: its {begun[-1] if begun else 'processor'}"
    if status == -signal.SIGALRM:
        raise Exhausting(f"{what} takes over {SECONDS:.0f} seconds for one short question")
    if status == EXHAUSTED:
        raise Exhausting(f"{what} takes over {MEMORY_BYTES >> 20} MB for one short question")
    if status == ENDLESS:
        raise Exhausting(f"{what} makes over {MAX_CHARACTERS} characters of one short question")
    if status < 0:
        raise Exhausting(f"{what} is ended by {signal.Signals(-status).name} on one short question")
    if status:
        raise InputError(f"{what} fails ({reason or f'status {status}'})")


def _tried(processor: ProcessorMixin, writer: int) -> int:
    """The exit status of a child that tries the processor; it is killed if this process is interrupted."""
    child, before = 0, signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child must not unwind to here
    try:
        child = os.fork()
        if not child:
            _try_and_exit(processor, writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with suppress(ProcessLookupError, ChildProcessError):
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        raise


def _try_and_exit(processor: ProcessorMixin, writer: int) -> None:
    """Says what it begins with, a line each, and at last, without a line's end, why it failed."""
    status = 1
    try:
        _end_on_signals()
        writer = _keep_only(writer)
        torch.set_num_threads(1)  # the threads there were did not come along
        with at_most(MEMORY_BYTES):
            status = _try(processor, writer)
    except MemoryError:
        status = EXHAUSTED
    except BaseException as error:
        cause = error.__cause__ or error
        os.write(writer, f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:500].encode(errors="replace"))
    finally:
        os._exit(status)


def _try(processor: Any, writer: int) -> int:
    for picture in ([], [{"type": "image", "image": Image.new("RGB", PICTURE_SIZE, "grey")}]):
        turn = [{"role": "user", "content": [*picture, {"type": "text", "text": QUESTION}]}]
        os.write(writer, b"chat template\n")
        if len(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)) > MAX_CHARACTERS:
            return ENDLESS
        os.write(writer, b"processor\n")
        encoded(processor, [turn], Path())
    return 0


def _end_on_signals() -> None:
    """Ctrl-C ends the process, and SIGALRM does after SECONDS, whatever it is doing."""
    ends = {signal.SIGINT, signal.SIGALRM}
    for each in ends:
        signal.signal(each, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)


def _keep_only(descriptor: int) -> int:
    """Closes every open file but this one, whose new number is returned; standard streams lead nowhere then."""
    kept = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 3)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    return kept
