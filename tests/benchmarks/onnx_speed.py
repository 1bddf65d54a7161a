"""Tokens a second, onnxruntime and transformers side by side: python tests/benchmarks/onnx_speed.py [--provider cuda]

On the demo and on a random LLaVA of about 300 M parameters: greedy decoding of one row with a key-value cache, prompt
included, on the CPU in float32 or on a CUDA card in float16; runs in turns, medians. OMP_NUM_THREADS sets the threads
of both.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import shape
from transformers import AutoModelForImageTextToText, BatchFeature
from transformers.utils import logging

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats.onnx.graphs import Plan, write_graphs
from guardfold.export.formats.onnx.layout import precisions
from guardfold.guard.model.vlm import resolve
from guardfold.validators.runtimes.onnx import Runner, device_for

PROMPT, TOKENS = 24, 48


def medium(folder: Path) -> Path:
    """A random LLaVA of 0.3 billion parameters."""
    config = shape(16)
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16}
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    config.text_config.head_dim = 64
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    print(f"{sum(each.numel() for each in model.parameters()) / 1e6:.0f} M parameters")
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="a folder with 3 GB of room")
    given = parser.parse_args()
    logging.set_verbosity_error()
    device = device_for(given.provider)
    name, dtype = ("fp16", torch.float16) if device == "cuda" else ("fp32", torch.float32)
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folders = {"demo": resolve("demo")[0], "medium": medium(Path(scratch) / "medium")}
        for title, folder in folders.items():
            target = Path(scratch) / f"{title}-onnx"
            target.mkdir()
            shutil.copy(folder / "config.json", target)
            write_graphs(Checkpoint.open(folder), target, Plan(precisions(name)))
            model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
            model = model.to(device).eval()
            runner = Runner(target, precisions(name)[0], given.provider)
            ids = torch.randint(4, 250, (1, PROMPT), generator=torch.Generator().manual_seed(0))
            batch = BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            count = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
            ends = model.generation_config.eos_token_id
            speeds: dict[str, list[float]] = {"transformers": [], "onnxruntime": []}
            with torch.inference_mode():
                for run in range(given.runs + 1):
                    start = time.perf_counter()
                    said = model.generate(**batch.to(device), **count)[0, PROMPT:].tolist()
                    middle = time.perf_counter()
                    ours = [int(token) for token in runner.tokens(batch.to("cpu"), TOKENS, [ends] if ends else [])]
                    if run:  # the first warms both up
                        speeds["transformers"].append(TOKENS / (middle - start))
                        speeds["onnxruntime"].append(TOKENS / (time.perf_counter() - middle))
            ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
            medians = ", ".join(f"{who} {statistics.median(each):.1f}" for who, each in speeds.items())
            print(
                f"{title}, {device}, {name}: {medians} tokens/s, ratio {ratio:.2f}, same tokens: {ours == said}",
                flush=True,
            )
            del model, runner


if __name__ == "__main__":
    main()
