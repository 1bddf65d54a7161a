"""A folder as `guardfold export` leaves it, made in a second: a tiny model in shards, its guard, card and manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from zoo import random_basis

from guardfold.export.publish.card import write_card
from guardfold.export.publish.manifest import GUARD_FILE, write_manifest
from guardfold.export.source import Source
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection


def publish(model: Path, folder: Path, ruling: str = "safer", shards: int = 1, source: str = "demo") -> Path:
    """Copies `model` to `folder`, its weights in `shards` files, and adds what goes with guarded weights."""
    shutil.copytree(model, folder)
    if shards > 1:
        _split(folder, shards)
    guard = Guard((SublayerProjection({1: random_basis(1, 32)}),))
    (folder / GUARD_FILE).parent.mkdir()
    guard.save(folder / GUARD_FILE)
    made_from, verified = Source(source, model), ruling == "safer"
    write_card(folder, made_from, guard, ruling, verified, "Nothing was measured.")
    write_manifest(folder, made_from, guard, "repair", ruling, verified, {})
    return folder


def _split(folder: Path, shards: int) -> None:
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    places = {
        name: f"model-{at * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)
    }
    for file in sorted(set(places.values())):
        held = {name: tensors[name] for name in names if places[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
