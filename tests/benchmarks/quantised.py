"""The demo and its guarded form in llama.cpp, per quantisation: python tests/benchmarks/quantised.py FOLDER

FOLDER holds a build of llama.cpp, or is where one is made (see tests/llamacpp.py). All probes of the demo are asked, as
`guardfold check --endpoint` asks them; prints a table of harmful compliance in %, original and guarded.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from llamacpp import QUANTISATIONS, LlamaCpp, compare

from guardfold.guard.prompts.image_kinds import IMAGE_KINDS
from guardfold.pipeline import Served, export_guarded
from guardfold.validators.behaviour.measure import Behaviour
from guardfold.validators.demo import DEMO

TYPE = re.compile(r"converting to (\w+)")


def row(behaviour: Behaviour) -> str:
    """Compliance per image kind, the lowest share of right benign answers, right answers to image questions; in %."""
    rates = [behaviour.kinds[kind].rates() for kind in IMAGE_KINDS]
    complied = [f"{100 * rate['complied'].rate:.1f}" for rate in rates]
    correct = min(rate["correct"].rate for rate in rates)
    return " | ".join([*complied, f"{100 * correct:.1f}", f"{100 * sum(behaviour.qa) / len(behaviour.qa):.1f}"])


def lines(kind: str, served: Served) -> list[str]:
    """Two rows of the table."""
    assert served.baseline and served.verdict
    return [
        f"| {kind} | original | {row(served.baseline)} | |",
        f"| {kind} | guarded | {row(served.behaviour)} | {served.verdict.ruling} |",
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    llama = LlamaCpp(parser.parse_args().folder.resolve())
    llama.build()
    table = [f"| | | {' | '.join(IMAGE_KINDS)} | benign right | image questions right | verdict |"]
    with tempfile.TemporaryDirectory() as scratch:
        models = {"original": DEMO, "guarded": export_guarded("demo", Path(scratch) / "guarded").folder}
        tower = Path(scratch) / "mmproj.gguf"
        llama.convert_tower(models["guarded"], tower)
        for kind in QUANTISATIONS:
            ggufs = {name: Path(scratch) / f"{name}-{kind}.gguf" for name in models}
            said = {name: llama.quantise(models[name], gguf, kind) for name, gguf in ggufs.items()}
            types = TYPE.findall(said["guarded"])
            print(kind, {each: types.count(each) for each in sorted(set(types))})
            table += lines(kind, compare(llama, ggufs, tower))
    print("\n".join(table))


if __name__ == "__main__":
    main()
