"""The interpreter in which processors are tried: `python -m guardfold.guard.model.trial_server IDLE_SECONDS`.

It imports what processors need, which takes seconds, and then forks a process for every request that it reads from the
socket that is its standard input, which takes milliseconds. It runs nothing of any model itself, has no thread but one,
and ends when nobody holds the other end of its socket, or nobody has asked anything for a while.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import InputError
from ..base.limits import memory_limited
from ..base.remote_code import trusting

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

MEMORY_BYTES = 2**30
LOADING_SECONDS, LOADING_BYTES = 120.0, 4 * 2**30
"""Before it is asked anything: large vocabularies are read and sorted."""

STARTING_SECONDS = 600.0
"""Of starting an interpreter and importing transformers, on a machine that has much else to do."""

MAX_CHARACTERS = 2**20
"""Of what a template may make of one question."""

FAULTY, EXHAUSTED, ENDLESS = 2, 3, 4
"""Exit statuses of a trial, beside 0."""

LOADING, TEMPLATE, ASKING = "processor's files", "chat template", "processor"
"""What it writes that it begins with, a line each; at last, without a line's end, it writes what is wrong."""

ENDED = b"\0"
"""Before its exit status (that of os.waitstatus_to_exitcode), in the last packet that is sent."""

PACKET_BYTES = 2**16
PICTURE_SIZE = (336, 336)


@dataclass(frozen=True)
class Request:
    """A processor to try; with it come two descriptors: a socket for answers, and the folder that `folder` is
    relative to.
    """

    folder: str
    seconds: float
    trusted: bool

    def packed(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def main() -> None:
    """Forks a process for every request, until there are no more."""
    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, STARTING_SECONDS)
    from . import complaints, processor  # noqa: F401

    signal.setitimer(signal.ITIMER_REAL, 0)
    requests = socket.socket(fileno=0)
    requests.settimeout(float(sys.argv[1]))
    while True:
        try:
            packet, descriptors, *_ = socket.recv_fds(requests, PACKET_BYTES, 2)
        except TimeoutError:
            requests.shutdown(socket.SHUT_RD)  # what has been sent until now can still be read
            continue
        if not packet:
            return
        if not os.fork():
            _keep(Request(**json.loads(packet)), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(request: Request, answers: int, place: int) -> None:
    """Tries in a further process, ends that when nobody waits for it any longer, and sends how it ended."""
    try:
        os.fchdir(place)
        os.dup2(answers, 0)  # instead of requests: nothing else is inherited
        os.closerange(3, max(answers, place) + 1)
        with socket.socket(fileno=0) as channel:
            trial = os.fork()
            if not trial:
                _tried(request, channel)
            ending = os.pidfd_open(trial)
            ready, _, _ = select.select([ending, channel.fileno()], [], [])
            if ending not in ready:
                os.kill(trial, signal.SIGKILL)
            _, status = os.waitpid(trial, 0)
            channel.send(ENDED + str(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def _tried(request: Request, channel: socket.socket) -> None:
    """Ends this process with the outcome of `request`."""
    status = FAULTY
    try:
        with trusting(request.trusted):
            status = _try(Path(request.folder), request.seconds, lambda text: channel.send(f"{text}\n".encode()))
    except MemoryError:
        status = EXHAUSTED
    except BaseException as error:
        fault = f"{request.folder}: its processor cannot take one short question ({type(error).__name__}: {error})"
        complaint = str(error) if isinstance(error, InputError) else fault
        channel.send(" ".join(complaint.split())[:2000].encode(errors="replace"))
    finally:
        os._exit(status)


def _try(folder: Path, seconds: float, begin: Callable[[str], object]) -> int:
    """0 or ENDLESS; InputError for what is wrong with the processor in `folder`."""
    import torch
    from PIL import Image

    from .processor import QUESTION, encoded, opened

    torch.set_num_threads(1)
    signal.setitimer(signal.ITIMER_REAL, LOADING_SECONDS)
    begin(LOADING)
    with memory_limited(LOADING_BYTES):
        processor = opened(folder)
    picture = Image.new("RGB", PICTURE_SIZE, "grey")
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with memory_limited(MEMORY_BYTES):
        begin(TEMPLATE)
        if _check_template(processor, folder, picture) > MAX_CHARACTERS:
            return ENDLESS
        for asked in ((QUESTION, None), (QUESTION, picture)):
            begin(ASKING)
            encoded(processor, [asked], folder)
    return 0


def _check_template(processor: ProcessorMixin, folder: Path, picture: Image) -> int:
    """Returns how many characters its chat template makes of the question; InputError if that is not the question, and
    with a picture a place for it.
    """
    from .complaints import own_words
    from .processor import QUESTION, TEMPLATE_FILE, form_of, words_of

    advice = f"write the one that was published with the model to {TEMPLATE_FILE}"
    try:
        alone, shown = (words_of(processor, (QUESTION, image)) for image in (None, picture))
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of others
        raise InputError(f"{folder}: its chat template fails ({own_words(error)}); {advice}") from error
    longest = max(map(len, (alone, shown)))
    if longest > MAX_CHARACTERS:
        return longest
    if QUESTION not in alone or "'type': 'text'" in alone:
        raise InputError(f"{folder}: its chat template does not take a question in parts; {advice}")
    if shown == alone and form_of(processor) is None:
        raise InputError(f"{folder}: its chat template has no place for a picture; {advice}")
    return longest


if __name__ == "__main__":
    main()
