"""Tokens per second of a guarded folder against its original, side by side: python tests/benchmarks/generation.py A B

Interleaved A B A B with an A-against-A control, greedy, the same prompts; prints medians, ranges and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from guardfold.guard.model.vlm import VLM, load, resolve
from guardfold.guard.prompts.prompts import Prompt, encode, illustrated

TOKENS, BATCH = 48, 8


def tokens_per_second(vlm: VLM) -> float:
    """Generated tokens a second over one batch of pictured prompts, exactly TOKENS each."""
    inputs = encode(vlm, illustrated([Prompt(f"how do i bake the bread number {i} ?") for i in range(BATCH)], "shape"))
    start = time.perf_counter()
    vlm.model.generate(**inputs, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)  # type: ignore[operator]
    return BATCH * TOKENS / (time.perf_counter() - start)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original")
    parser.add_argument("guarded", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = {"original": load(resolve(given.original)[0]), "guarded": load(given.guarded)}
    models["control"] = models["original"]
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for run in range(given.runs + 1):
        for name, vlm in models.items():
            speed = tokens_per_second(vlm)
            if run:  # the first warms up
                speeds[name].append(speed)
    for name, values in speeds.items():
        paired = statistics.median(mine / base for mine, base in zip(values, speeds["original"], strict=True))
        spread = f"{min(values):.0f} to {max(values):.0f}"
        print(f"{name:9} {statistics.median(values):8.0f} tokens/s ({spread})  median paired ratio {paired:.3f}")


if __name__ == "__main__":
    main()
