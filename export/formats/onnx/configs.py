"""What clients read beside the graphs: configs as transformers.js looks for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....guard.model.generation import asks_for
from .layout import DECODER, GRAPHS, MERGED, VISION, Precision, graph_file
from .vision import VisionPath

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
SEARCH = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("min_length", "num_beams", "num_return_sequences", "diversity_penalty"),
)
"""What onnxruntime-genai applies of what a generation config asks for; transformers.js reads that config itself."""

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


def write_genai_config(path: VisionPath, folder: Path, place: Path, precision: Precision) -> None:
    """genai_config.json in `folder` for the graphs in `place`, if onnxruntime-genai knows the family."""
    if path.genai is None:
        return
    text, saved = path.model.config.get_text_config(), _read(folder / "generation_config.json")
    ids = {
        name: saved.get(name, getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if start := getattr(path.model.config, "vision_start_token_id", None):
        ids["vision_start_token_id"] = start
    files = {name: (place / graph_file(name, precision)).relative_to(folder).as_posix() for name in (*GRAPHS, MERGED)}
    config = path.model.config.vision_config
    model = {
        "type": path.genai,
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "image_token_id": path.model.config.image_token_id,
        **{name: value for name, value in ids.items() if value is not None},
        "decoder": {
            "filename": files[DECODER],
            "head_size": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            "hidden_size": text.hidden_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "inputs": {
                **{name: name for name in ("inputs_embeds", "attention_mask", "position_ids")},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "embedding": {
            "filename": files[MERGED],
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": files[VISION],
            "config_filename": PROCESSOR,
            "spatial_merge_size": getattr(config, "spatial_merge_size", None) or path.model.config.spatial_merge_size,
            "patch_size": config.patch_size,
            "inputs": {name: name for name in path.sketch().names},
            "outputs": {"image_features": "image_features"},
        },
    }
    asked = {name: value for name, value in asks_for(folder).items() if name in SEARCH}
    search = {
        **{"do_sample": False, "max_length": text.max_position_embeddings, "past_present_share_buffer": False},
        **asked,
    }
    _write(folder / "genai_config.json", {"model": model, "search": search})


def _whole_counts(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same number of image tokens, said so that clients that know no strategy for dropping tokens count
    right.
    """
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
