"""Processors are foreign files, and some are programs: chat templates, which transformers runs in a sandbox, and the
rules of tokenizers. This bounds what they take.

A processor is tried once, before it is used, in an interpreter of its own: one that has no lock, no open file and no
device of this process, and ends by itself when its time is up, should this process be killed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.errors import InputError
from ..base.limits import at_most
from ..base.remote_code import MAX_CONFIG_BYTES, trusted, trusting
from ..base.untrusted import open_regular, parse_object, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

SECONDS = 10.0
MEMORY_BYTES = 2**30
LOADING_SECONDS, LOADING_BYTES = 120.0, 4 * 2**30
"""Before it is asked anything: large vocabularies are read and sorted."""

STARTING_SECONDS = 600.0
"""Of starting an interpreter and importing transformers, on a machine that has much else to do."""

MAX_CHARACTERS = 2**20
"""Of what a template may make of one question."""

FAULTY, EXHAUSTED, ENDLESS = 2, 3, 4
"""Exit statuses of the interpreter, beside 0."""

LOADING, TEMPLATE, ASKING = "processor's files", "chat template", "processor"
"""What it says that it begins with."""

PICTURE_SIZE = (336, 336)

READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
NOT_READ = ("config.json", "report.json", "guardfold.json", "generation_config.json", "model.safetensors.index.json")
"""Of files in a model folder: what processors are made of, and what they are not."""

OF_CONFIG = ("model_type", "processor_class", "tokenizer_class", "auto_map")
"""What decides in config.json which classes load a processor."""

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
    digest = _digest(folder)
    if digest in _sound:
        yield lambda: None
        return
    with _interpreter(folder) as process:

        def end() -> None:
            said, _ = process.communicate(timeout=STARTING_SECONDS + LOADING_SECONDS + SECONDS)
            _judge(folder, process.returncode, said.decode(errors="replace"))
            _sound.add(digest)

        yield end


def _digest(folder: Path) -> bytes:
    """Of everything in `folder` that a processor is made of."""
    found = hashlib.sha256(str(trusted()).encode())
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.name.endswith(READ_SUFFIXES) and path.name not in NOT_READ and not path.is_dir():
            name = str(path.relative_to(folder))
            with os.fdopen(open_regular(folder, name), "rb") as file:
                found.update(
                    f"{name}\n".encode(errors="surrogateescape") + hashlib.file_digest(file, "sha256").digest()
                )
    config = parse_object(read_bytes(folder, "config.json", MAX_CONFIG_BYTES), str(folder / "config.json"))
    found.update(json.dumps({name: config.get(name) for name in OF_CONFIG}).encode())
    return found.digest()


@contextmanager
def _interpreter(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that tries the processor in `folder`; gone when the block ends, however it ends."""
    command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, str(folder), str(SECONDS)]
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(place for place in sys.path if place),
    }
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, "trusted"] if trusted() else command,
        stdin=nowhere,
        stdout=subprocess.PIPE,
        stderr=nowhere,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _judge(folder: Path, status: int, said: str) -> None:
    """Raises InputError for what an interpreter that ended with `status` found, if it found anything."""
    *begun, complaint = said.split("\n")
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


def main() -> None:
    """What the interpreter runs: `python -m guardfold.guard.model.trial FOLDER SECONDS [trusted]`.

    It says what it begins with, a line each, and at last, without a line's end, what is wrong.
    """
    folder, seconds, *more = sys.argv[1:]
    for each in (signal.SIGINT, signal.SIGALRM):
        signal.signal(each, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, STARTING_SECONDS)
    writer, status = os.dup(1), FAULTY
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is not what it says
    try:
        with trusting(bool(more)):
            status = _try(Path(folder), float(seconds), lambda text: os.write(writer, f"{text}\n".encode()))
    except MemoryError:
        status = EXHAUSTED
    except BaseException as error:
        said = str(error) if isinstance(error, InputError) else f"{folder}: {type(error).__name__}: {error}"
        os.write(writer, " ".join(said.split())[:2000].encode(errors="replace"))
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
    with at_most(LOADING_BYTES):
        processor = opened(folder)
    picture = Image.new("RGB", PICTURE_SIZE, "grey")
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with at_most(MEMORY_BYTES):
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
        alone, shown = (words_of(processor, (QUESTION, each)) for each in (None, picture))
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of others
        raise InputError(f"{folder}: its chat template fails ({own_words(error)}); {advice}") from error
    if QUESTION not in alone or "'type': 'text'" in alone:
        raise InputError(f"{folder}: its chat template does not take a question in parts; {advice}")
    if shown == alone and form_of(processor) is None:
        raise InputError(f"{folder}: its chat template has no place for a picture; {advice}")
    return max(map(len, (alone, shown)))


if __name__ == "__main__":
    main()
