"""The `guardfold` command, and `python -m guardfold`."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Runs the command. Ctrl-C ends it in one line even before there is anything that could be interrupted."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)
    from . import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


def _quit(*_: Any) -> None:
    os.write(2, b"guardfold: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
