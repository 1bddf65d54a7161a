"""The `guardfold` command in processes of their own, forked from one that has done the slow imports already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SERVER = """
import json, os, runpy, sys, traceback
import guardfold.cli, guardfold.pipeline, guardfold.validators.report
from guardfold.guard.model import trial
from pathlib import Path

trial.IDLE_SECONDS = 3600.0

def tried(folder):
    with trial.trying(Path(folder)) as end:
        end()

for folder in sys.argv[1:]:
    tried(folder)
for line in sys.stdin:
    job = json.loads(line)
    if "tried" in job:
        tried(job["tried"])
        print(0, flush=True)
        continue
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(job["cwd"])
    for descriptor, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    sys.argv, status = ["guardfold", *job["arguments"]], 0
    try:
        runpy.run_module("guardfold", run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",
}


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that was said on standard error."""
        (line,) = self.err.splitlines()
        return line


class Command:
    """Runs `guardfold ARGUMENTS` in the folder `cwd`; use it in a `with` block.

    tried: model folders whose processors are tried once for all runs.
    """

    def __init__(self, scratch: Path, *tried: Path) -> None:
        self.out, self.err = scratch / "out", scratch / "err"
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *map(str, tried)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            env={**os.environ, **ENVIRONMENT},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()

    def __call__(self, *arguments: object, cwd: Path) -> Done:
        job = {
            "arguments": [str(each) for each in arguments],
            "cwd": str(cwd),
            "out": str(self.out),
            "err": str(self.err),
        }
        return Done(self._does(job), self.out.read_text("utf-8"), self.err.read_text("utf-8"))

    def tries(self, folder: Path) -> None:
        """Tries the processor in `folder` once for all runs from now on."""
        self._does({"tried": str(folder)})

    def _does(self, job: Mapping[str, Any]) -> int:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())
