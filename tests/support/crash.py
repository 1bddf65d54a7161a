"""Runs that end badly: exports in processes of their own, killed from outside, and what they leave behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from zoo import Tiny, random_basis

from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.model.vlm import load_processor
from guardfold.pipeline import GuardOptions, check_guarded, export_guarded

FORMATS = {"one file": "5GB", "shards": "20KB"}


def model_and_guard(folder: Path, shards: str) -> tuple[Path, Path]:
    """A tiny model in bfloat16 under `folder`, in files of at most `shards`, and a guard file for it."""
    import torch

    model = Tiny(dtype=torch.bfloat16).save(folder / "model", max_shard_size=shards)
    Guard((SublayerProjection({1: random_basis(1, 32)}),)).save(folder / "guard.safetensors")
    load_processor(model)  # tried once here, not again by every run
    return model, folder / "guard.safetensors"


def export(model: Path, guard: Path, output: Path, overwrite: bool = False) -> None:
    """`guardfold export` without measuring behaviour."""
    export_guarded(str(model), output, GuardOptions(guard=str(guard)), skip_behaviour=True, overwrite=overwrite)


def run(place: Path, overwrite: bool = False) -> None:
    """The same, from and to where the tests have them."""
    export(place / "model", place / "guard.safetensors", place / "out" / "guarded", overwrite)


def fails(code: int) -> Callable[..., Any]:
    """What fails as the system does, with `code` of errno."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does `work` and exits: 0 if it returned, 2 on an InputError, else 1."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except InputError:
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The exit status of a child that was forked, -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def absent_or_whole(output: Path, model: Path) -> bool:
    """Whether there is an output; asserts that it is complete, and equal to its hooks, if there is."""
    if not os.path.lexists(output):
        return False
    manifest = json.loads((output / "guardfold.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == digest, name
    assert check_guarded(output, str(model), skip_behaviour=True).sound
    return True


def killed_exports(scratch: Path, shards: str, times: int, seed: int) -> tuple[int, int]:
    """(killed, finished) of `times` exports that were each sent SIGKILL at a random moment of their run.

    Asserts after each that the output is absent or whole, and at the end that one more export works and cleans up.
    """
    draw, finished = random.Random(seed), 0
    model, guard = model_and_guard(scratch, shards)
    output = scratch / "out" / "guarded"
    export(model, guard, output)  # whatever is slow the first time
    start = time.perf_counter()
    assert ended(forked(partial(export, model, guard, output, True))) == 0
    whole = time.perf_counter() - start
    for number in range(times):
        overwrite = number % 2 == 1
        if not overwrite:
            remove(output)
        was_whole = output.exists()
        child = forked(partial(export, model, guard, output, overwrite))
        time.sleep(1.1 * whole * (number + draw.random()) / times)  # the first is early whatever else runs
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        assert status in (0, -signal.SIGKILL), f"the run before this one left something: status {status}"
        finished += status == 0
        assert absent_or_whole(output, model) or not was_whole, "an output that was whole is never lost"
    export(model, guard, output, overwrite=True)
    assert absent_or_whole(output, model)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    return times - finished, finished


def remove(folder: Path) -> None:
    """Removes `folder` if it is there."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@contextmanager
def disk(place: Path, size: str) -> Iterator[bool]:
    """A filesystem of `size` at the folder `place`; False, and none, where this process may not mount one."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = sys.platform == "linux" and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)
