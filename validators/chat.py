"""One question to an exported folder, answered token by token in torch or in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from ..export.onnx.layout import precisions
from ..guard.errors import InputError
from ..guard.prompts import Prompt, encode, load_image
from ..guard.vlm import VLM, load, load_processor
from .runner import Runner, graphs_in

RUNTIMES = ("torch", "onnx")


def answer(
    folder: Path,
    text: str,
    image: Path | None = None,
    runtime: str | None = None,
    precision: str | None = None,
    provider: str = "auto",
    most: int = 256,
) -> Iterator[str]:
    """Pieces of the most likely answer to `text` (about the picture `image`), at most `most` tokens, as they come.

    runtime: torch or onnx; by default torch where there are safetensors.  precision: which graphs, by default the
    first there are.  Raises InputError for a folder or picture that cannot be used.
    """
    if runtime not in (None, *RUNTIMES):
        raise InputError(f"--runtime {runtime}: one of {', '.join(RUNTIMES)}")
    picture = load_image(image.parent, image.name, "--image") if image else None
    chosen = runtime or ("torch" if any(folder.glob("*.safetensors")) else "onnx")
    vlm = load(folder) if chosen == "torch" else _in_onnxruntime(folder, precision, provider)
    return _streamed(vlm, Prompt(text, picture), most)


def _in_onnxruntime(folder: Path, precision: str | None, provider: str) -> VLM:
    found = precisions(precision) if precision else tuple(graphs_in(folder))
    if not found:
        raise InputError(f"{folder}: no ONNX graphs; export them with --format onnx")
    return Runner(folder, found[0], provider).vlm


def _streamed(vlm: VLM, prompt: Prompt, most: int) -> Iterator[str]:
    inputs = encode(vlm, [prompt])
    streamer = TextIteratorStreamer(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    raise NotImplementedError
