"""config.json of what is written: as it was read but for what a fold changes, and held to what it is to describe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...guard.base.errors import InputError
from ...guard.model.vlm import meta_model
from ..families.table import Family
from ..fold import Fold
from .companions import copy_code
from .headers import Checkpoint
from .layout import Layout

PLACE = "_name_or_path"
"""What a config says of where it was read."""


def write_json(path: Path, value: object) -> None:
    """Writes `value` as JSON. OSError as the disk does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _changes(family: Family, fold: Fold) -> dict[str, Any]:
    return {**fold.text_config, **({"tie_word_embeddings": False} if family.embedding in fold.edits else {})}


def new_config(config: Mapping[str, Any], family: Family, fold: Fold) -> Mapping[str, Any]:
    """config.json with what `fold` changes, where `config` has the text model's settings: at its top, or in an entry of
    their own, and then at the top as well what has a copy there. That nothing is tied is said at both.
    """
    changes = _changes(family, fold)
    if not changes or family.text_config_key is None:
        return {**config, **changes}
    inner = config[family.text_config_key]
    copied = {key for key in changes if key in inner and config.get(key) == inner[key]}
    above = {key: value for key, value in changes.items() if key in {*copied, "tie_word_embeddings"}}
    return {**config, **above, family.text_config_key: {**inner, **changes}}


def check_new_model(checkpoint: Checkpoint, family: Family, fold: Fold) -> None:
    """Raises InputError unless transformers would load what `fold` makes of `checkpoint`: the tensors that there will
    be, with the config that there will be, and nothing else about the model changes. Reads no weights, and writes none.
    """
    config = new_config(checkpoint.config, family, fold)
    if config == checkpoint.config and not fold.grown:
        return
    fault = next(_faults(checkpoint, family, fold, config), None)
    if fault and fold.text_config:
        settings = " and ".join(f"{key} = {value}" for key, value in fold.text_config.items())
        advice = "--placement recycle" if family.neurons_key in fold.text_config else "--format onnx"
        raise InputError(
            f"{checkpoint.folder}: the MLPs of {family.text_model_type} cannot grow alone: with {settings} in its "
            f"config, {fault}; use {advice}"
        )
    if fault:
        raise InputError(f"{checkpoint.folder}: transformers would not load the result ({fault})")


def _faults(checkpoint: Checkpoint, family: Family, fold: Fold, config: Mapping[str, Any]) -> Iterator[str]:
    with TemporaryDirectory() as place:
        write_json(Path(place) / "config.json", config)
        copy_code(checkpoint.folder, Path(place))
        try:
            model = meta_model(Path(place))
        except InputError as error:
            yield str(error).removeprefix(f"{place}: ")
            return
    embedding = checkpoint.shapes[family.embedding]
    head = {family.untied_head: embedding} if fold.untie else {}
    yield from Layout(model, {**checkpoint.shapes, **fold.grown, **head}).faults()
    before, after = (dict(_leaves(built.config.to_dict())) for built in (checkpoint.model, model))
    for path in sorted(path for path in {*before, *after} if before.get(path) != after.get(path)):
        if path[-1] not in {*_changes(family, fold), PLACE}:
            yield f"{'.'.join(path)} would be {after.get(path)!r}, and is {before.get(path)!r}"


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Returns (names of the entries that lead there, value) of everything in `value` that is no object itself."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*path, str(key)))
