"""Peak memory, time and disk of writing the graphs of a 7B LLaVA: python tests/benchmarks/onnx_memory.py

Makes a float16 checkpoint of LLaVA-1.5-7B's shapes whose weights are holes in sparse files (zeros that take no disk),
and reports what writing its float16 graphs takes: with weights shared, then copied (this takes 14 GB of disk).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from accelerate import init_empty_weights
from memory import legacy, shape
from transformers import AutoModelForImageTextToText

SHARD_BYTES = 5e9
WRITE = """
import sys
from pathlib import Path
from guardfold.export.checkpoint import Checkpoint
from guardfold.export.onnx.graphs import Plan, write_graphs
from guardfold.export.onnx.layout import precisions

folder, target, weights = sys.argv[1:]
write_graphs(Checkpoint.open(Path(folder)), Path(target), Plan(precisions("fp16"), weights))
"""


def make(folder: Path, layers: int) -> int:
    """Writes the checkpoint, all holes; returns its size in bytes."""
    folder.mkdir()
    config = shape(layers)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(2 * math.prod(each) for each in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][legacy(name)] = tuple(parameter.shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        entries, end = {}, 0
        for name, dims in shard.items():
            begin, end = end, end + 2 * math.prod(dims)
            entries[name] = {"dtype": "F16", "shape": list(dims), "data_offsets": [begin, end]}
        header = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(path, 8 + len(header) + end)
        weight_map.update(dict.fromkeys(shard, path.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scratch", type=Path, help="a folder with 15 GB of room")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch) / "model"
        size = make(folder, given.layers)
        before = {path: path.stat().st_size for path in folder.iterdir()}
        for weights in ("shared", "copy"):
            target = folder if weights == "shared" else Path(scratch) / "copied"
            target.mkdir(exist_ok=True)
            if target != folder:
                shutil.copy(folder / "config.json", target)
            start = time.perf_counter()
            child = subprocess.Popen([sys.executable, "-c", WRITE, str(folder), str(target), weights])
            _, status, usage = os.wait4(child.pid, 0)
            assert status == 0
            written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file() and path not in before)
            seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 1024
            said = f"{seconds:.0f} s, peak {peak:.0f} MiB, {written / 1e6:.1f} MB written"
            print(f"{size / 1e9:.2f} GB, {weights}: {said}", flush=True)


if __name__ == "__main__":
    main()
