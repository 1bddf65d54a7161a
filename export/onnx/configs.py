"""What clients read beside the graphs: configs as transformers.js looks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def write_client_files(folder: Path, first: str, data_files: Mapping[str, int]) -> None:
    """Completes the configs in `folder` so that transformers.js loads it as it is; transformers reads the same of them.

    first: the number format to be used where a client names none.  data_files: graph's file -> its data files.
    """
    _change(
        folder / CONFIG, **{"transformers.js_config": {"dtype": first, "use_external_data_format": dict(data_files)}}
    )
    processor = _read(folder / PROCESSOR)
    if processor:
        images = _read(folder / PREPROCESSOR) or dict(processor.get("image_processor", {}))
        _write(folder / PREPROCESSOR, {**images, "processor_class": processor.get("processor_class")})
        _write(folder / PROCESSOR, _whole_counts(processor))
    if (folder / TEMPLATE).is_file() and (folder / TOKENIZER).is_file():
        _change(folder / TOKENIZER, chat_template=(folder / TEMPLATE).read_text(encoding="utf-8"))


def _whole_counts(processor: Mapping[str, Any]) -> dict[str, Any]:
    """The same number of image tokens, said so that clients that know no strategy for dropping tokens count right."""
    extra = processor.get("num_additional_image_tokens")
    if extra is None or processor.get("vision_feature_select_strategy") != "default":
        return dict(processor)
    return {**processor, "num_additional_image_tokens": extra - 1, "vision_feature_select_strategy": "full"}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _change(path: Path, **entries: Any) -> None:
    _write(path, {**_read(path), **entries})
