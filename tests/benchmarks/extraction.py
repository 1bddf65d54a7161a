"""Where the time goes when a gate is made for a 300 M LLaVA: python tests/benchmarks/extraction.py [--pairs 100]

The model is random and has the demo's processor (24-pixel pictures, 9 image tokens), so only times mean anything. One
candidate is timed and multiplied by the number that selection tries.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from guardfold.guard.fitting.calibration import load_benign
from guardfold.guard.fitting.material import Material
from guardfold.guard.fitting.states import forward
from guardfold.guard.model.vlm import load, resolve
from guardfold.guard.presets.gate import GAINS, gates
from guardfold.guard.presets.layers import LAYER_SETS
from guardfold.guard.presets.vlm_guard import STRENGTHS
from guardfold.guard.prompts.prompts import Prompt, encode, load_anchors
from guardfold.validators.behaviour.judge import PhraseJudge
from guardfold.validators.behaviour.selection import CONFIRMED, Bench

TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18, "num_attention_heads": 16}


def random_llava(folder: Path) -> int:
    """Writes a random LLaVA with the demo's processor into `folder`; returns its number of parameters."""
    demo, _ = resolve("demo")
    shutil.copytree(demo, folder)
    config = AutoConfig.from_pretrained(demo)
    for name, value in {**TEXT, "num_key_value_heads": TEXT["num_attention_heads"], "head_dim": 64}.items():
        setattr(config.text_config, name, value)
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    given = parser.parse_args()
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - start
        return result

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        print(f"{random_llava(folder) / 1e6:.0f} M parameters, {given.pairs} pairs, {torch.get_num_threads()} threads")
        vlm = timed("load", lambda: load(folder))
        batch = encode(vlm, [Prompt("how do i bake the bread ?")] * vlm.batch_size)
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(5):
                forward(vlm.model.base_model, batch, use_cache=False)
        print(f"one forward: {(time.perf_counter() - start) / 5:.2f} s for {vlm.batch_size} prompts")
        anchors = load_anchors(folder / "anchors.jsonl").head(given.pairs)
        benign, depth = load_benign(folder / "benign.jsonl")[: given.pairs], len(vlm.layers)
        material = Material(vlm, anchors, benign, depth, range(depth), gains_biases=False)
        timed("directions", lambda: material.directions)
        timed("last tokens", lambda: material.last_tokens)
        candidates = timed("fitting detectors", lambda: list(gates(material)))
        bench = timed("bench: the original", lambda: Bench(vlm, material.parts["select"], PhraseJudge()))
        tried = len(candidates) + len(LAYER_SETS) * len(STRENGTHS)
        timed("one first decision", lambda: bench.decisions(candidates[0]))
        timed("one candidate", lambda: bench.figures(candidates[0]))
        seconds[f"{tried} first decisions (extrapolated)"] = tried * seconds.pop("one first decision")
        seconds[f"{CONFIRMED} candidates (extrapolated)"] = CONFIRMED * seconds.pop("one candidate")
    total = sum(seconds.values())
    for stage, spent in seconds.items():
        print(f"{stage:32} {spent:8.1f} s  {spent / total:5.1%}")
    print(
        f"{len(candidates)} gates over layers {sorted({each.settings['layer'] for each in candidates})}, gains {GAINS}"
    )


if __name__ == "__main__":
    main()
