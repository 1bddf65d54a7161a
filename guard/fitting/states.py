"""Hidden states of last prompt tokens: batched, only the layers asked for, and no further up than the last of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from ..base.errors import InputError
from ..base.progress import batched
from ..model.roles import decoder_layers, output_tensor, skipped_on_text
from ..model.vlm import VLM, running
from ..prompts.image_kinds import ImageKind
from ..prompts.prompts import Prompt, at_once, encode, illustrated, positions


class _Enough(BaseException):
    """Raised from the last hook that was needed: nothing above it has to run."""


@contextmanager
def _capturing(modules: dict[int, nn.Module], into: dict[int, Tensor]) -> Iterator[None]:
    last = max(modules)

    def capture(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            into[layer] = output_tensor(output)[:, -1].float()
            if layer == last:
                raise _Enough

        return hook

    handles = [module.register_forward_hook(capture(layer)) for layer, module in modules.items()]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Any, batch: BatchFeature, **options: Any) -> Any:
    """One pass of `model` (with or without its head) over a left-padded batch, positions counted from real tokens."""
    if not hasattr(model.base_model, "get_rope_index"):  # multimodal rotary positions are the model's own business
        options["position_ids"] = positions(batch)
    with running(model):
        return model(**batch, **options)


@torch.inference_mode()
def batch_states(vlm: VLM, prompts: Sequence[Prompt], layers: Sequence[int]) -> dict[int, Tensor]:
    """Returns layer -> h_l of the last prompt token, [len(prompts), d] float32, in one batch; the head never runs.

    A layer that a pass without a picture skips leaves the stream as the one below it left it.
    """
    states: dict[int, Tensor] = {}
    every = decoder_layers(vlm.model)
    skipped = frozenset() if prompts[0].image else skipped_on_text(vlm.model)
    run = {layer: _uppermost(layer, skipped) for layer in layers}
    with _capturing({layer: every[layer] for layer in run.values()}, states):
        forward(vlm.model.base_model, encode(vlm, prompts), use_cache=False)
    return {layer: states[below] for layer, below in run.items()}


def _uppermost(layer: int, skipped: Set[int]) -> int:
    """Returns the uppermost layer up to `layer` that runs. InputError if none does."""
    for each in range(layer, -1, -1):
        if each not in skipped:
            return each
    raise InputError(f"layer {layer}: without a picture neither it nor any below it runs; leave it out of --layers")


def text_states(vlm: VLM, prompts: Sequence[Prompt], layers: Sequence[int]) -> dict[int, Tensor]:
    """Returns layer -> h_l(q): the states of `prompts` with their images left out (TwoPass's second pass)."""
    return batch_states(vlm, [replace(prompt, image=None) for prompt in prompts], layers)


def prompt_states(
    vlm: VLM, prompts: Sequence[Prompt], layers: Sequence[int], what: str, kind: ImageKind | None = None
) -> dict[int, Tensor]:
    """Returns layer -> h_l of the last prompt token, [len(prompts), d], float32 on the CPU; a progress bar named
    `what`.

    A picture of `kind` is attached to each prompt.

    Raises InputError if a state is NaN or infinite (a damaged checkpoint, or float16 overflowing).
    """
    parts = [
        batch_states(vlm, illustrated(batch, kind), layers) for batch in batched(prompts, at_once(vlm, prompts), what)
    ]
    states = {layer: torch.cat([part[layer].cpu() for part in parts]) for layer in layers}
    for layer, state in states.items():
        if not torch.isfinite(state).all():
            raise InputError(
                f"layer {layer}: NaN or Inf in the hidden states; are the weights sound, and is the dtype wide enough?"
            )
    return states
