"""One question to a model folder, answered token by token in torch or in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TextStreamer

from ...export.formats.onnx.layout import precisions
from ...guard.base.errors import InputError
from ...guard.base.remote_code import trusting_if_asked
from ...guard.model.greedy import most_likely
from ...guard.model.vlm import VLM, load, resolve, threads_for
from ...guard.prompts.image_files import load_image
from ...guard.prompts.prompts import Prompt, encode
from .onnx import Runner, graphs_in

RUNTIMES = ("torch", "onnx")
Say = Callable[[str], None]


@trusting_if_asked
def answer_in_pieces(
    model: str,
    text: str,
    image: Path | None,
    say: Say,
    *,
    runtime: str | None = None,
    precision: str | None = None,
    provider: str = "auto",
    most: int = 256,
    trust_remote_code: bool = False,
) -> None:
    """Calls `say` with the pieces of the most likely answer to `text` (about the picture `image`), as they are made.

    runtime: torch or onnx; by default torch where there are safetensors.  precision: which graphs, by default the
    first there are.  most: tokens.  trust_remote_code: run code that comes with the model.  Raises InputError for a
    model or picture that cannot be used.
    """
    folder, _ = resolve(model)
    if runtime not in (None, *RUNTIMES):
        raise InputError(f"--runtime {runtime}: one of {', '.join(RUNTIMES)}")
    picture = load_image(image.parent, image.name, "--image") if image else None
    in_torch = runtime == "torch" or (runtime is None and any(folder.glob("*.safetensors")))
    with threads_for(folder), torch.inference_mode():
        vlm = load(folder) if in_torch else _in_onnxruntime(folder, precision, provider)
        most_likely(vlm.model, encode(vlm, [Prompt(text, picture)]), most, streamer=_Saying(vlm, say))


def _in_onnxruntime(folder: Path, precision: str | None, provider: str) -> VLM:
    found = precisions(precision) if precision else tuple(graphs_in(folder))
    if not found:
        raise InputError(f"{folder}: no ONNX graphs; export them with --format onnx")
    return Runner(folder, found[0], provider).vlm


class _Saying(TextStreamer):
    """Passes words on as soon as they are whole."""

    def __init__(self, vlm: VLM, say: Say) -> None:
        super().__init__(vlm.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.say(text)
