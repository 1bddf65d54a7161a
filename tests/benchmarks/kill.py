"""Kills exports at random moments: python tests/benchmarks/kill.py [--times 200] [--seed 0]

Half of them of a checkpoint in one file, half in shards; each export alternately makes a new folder or replaces one.
After each, the output must be absent or complete, with every hash as its manifest says, and equal to its hooks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from crash import FORMATS, killed_exports
from transformers.utils import logging


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # its lock is shared with the children: one killed inside would hold it for ever
    for name, shards in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch:
            killed, finished = killed_exports(Path(scratch), shards, given.times // len(FORMATS), given.seed)
        print(f"{name}: {killed} killed, {finished} finished first; every output absent or whole", flush=True)


if __name__ == "__main__":
    main()
