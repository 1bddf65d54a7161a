"""Peak memory and time of an export that measures no behaviour: python tests/benchmarks/memory.py [--layers 7]

Makes a random LLaVA-1.5-shaped checkpoint (bf16, 7 layers: 4.0 GB in 3 shards), guards it with random directions, and
reports wall time and peak resident memory of `guardfold export --skip-behaviour --guard FILE`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig

from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection

SHARD_BYTES = 1.6e9


def shape(layers: int, vision_layers: int = 24) -> Any:
    """The config of a LLaVA-1.5 with `layers` decoder layers."""
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=vision_layers,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return AutoConfig.for_model(
        "llava",
        text_config=text,
        vision_config=vision.to_dict(),
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def make(folder: Path, layers: int, vision_layers: int = 24) -> int:
    """Writes the checkpoint, shard by shard, in the hub's key style; returns its size in bytes."""
    folder.mkdir()
    config = shape(layers, vision_layers)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in model.named_parameters():
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16)
        shard[legacy(name)] = tensor.normal_(0, 0.02) if parameter.ndim > 1 else tensor
        total += 2 * tensor.numel()
        if sum(2 * each.numel() for each in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def legacy(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return "language_model.model." + name.removeprefix("language_model.")
    if name.startswith("vision_tower."):
        return "vision_tower.vision_model." + name.removeprefix("vision_tower.")
    return "language_model." + name if name.startswith("lm_head") else name


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="a folder with room for two copies")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as scratch:
        folder = Path(scratch)
        # In a process of its own: a child's peak counts its parent's memory at the time of the fork.
        making = multiprocessing.get_context("spawn").Process(target=make, args=(folder / "model", given.layers))
        making.start()
        making.join()
        size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
        basis = torch.nn.functional.normalize(torch.randn(1, 4096))
        Guard((SublayerProjection({given.layers - 1: basis}),)).save(folder / "sublayers.safetensors")
        Guard((SharedProjection(basis),)).save(folder / "shared.safetensors")
        for scope in ("sublayers", "shared"):
            start = time.perf_counter()
            command = [
                sys.executable,
                "-m",
                "guardfold",
                "export",
                "--model",
                str(folder / "model"),
                "--skip-behaviour",
            ]
            paths = ["--guard", str(folder / f"{scope}.safetensors"), "--output", str(folder / "out"), "--overwrite"]
            export = subprocess.Popen([*command, *paths], stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(export.pid, 0)
            assert status == 0, "the export failed"
            peak = usage.ru_maxrss / 1024
            print(f"{size / 1e9:.2f} GB, {scope}: {time.perf_counter() - start:.0f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
