"""What a projection does to a running model, written a second time and in another way than guardfold/guard/hooks.py.

There the shared projection acts on what norms read; here on what enters the decoder and what each layer adds to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

PICTURES = [Image.new("RGB", (30, 30), "red"), Image.linear_gradient("L").resize((40, 24)).convert("RGB")]


def without(states: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    return states - strength * (states @ basis.T.to(states)) @ basis.to(states)


@contextmanager
def output_changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def projected_sublayers(model: Any, bases: Mapping[int, Tensor], strength: float = 1.0) -> Iterator[None]:
    """`strength` of span(bases[l]) taken out of what attention and MLP of layer l return."""
    with ExitStack() as stack:
        for number, basis in bases.items():
            layer = model.model.language_model.layers[number]
            for module in (layer.self_attn, layer.mlp):
                stack.enter_context(output_changed(module, partial(without, basis=basis, strength=strength)))
        yield


@contextmanager
def projected_stream(model: Any, basis: Tensor, strength: float = 1.0) -> Iterator[None]:
    """`strength` of span(basis) taken out of the decoder's input and of everything that is added to it after."""
    layers = model.model.language_model.layers
    handle = layers[0].register_forward_pre_hook(lambda _m, args: (without(args[0], basis, strength), *args[1:]))
    try:
        with projected_sublayers(model, dict.fromkeys(range(len(layers)), basis), strength):
            yield
    finally:
        handle.remove()


def conversation(text: str, pictures: int = 0) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": picture} for picture in PICTURES[:pictures]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def inputs(processor: Any, *conversations: list[dict[str, Any]]) -> BatchFeature:
    """A left-padded batch, made by the processor alone."""
    processor.tokenizer.padding_side = "left"
    return processor.apply_chat_template(
        list(conversations),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )


def batches(processor: Any) -> dict[str, BatchFeature]:
    """Text of two lengths in one batch, one picture, and two pictures of different shapes for one prompt."""
    return {
        "text": inputs(
            processor, conversation("how to bake bread ?"), conversation("do people usually walk to work ?")
        ),
        "image": inputs(processor, conversation("how to walk home ?", 1)),
        "images": inputs(processor, conversation("why do people bake bread ?", 2)),
    }


@torch.inference_mode()
def logits(model: Any, batch: BatchFeature) -> Tensor:
    """[real tokens, vocabulary], float32 or better."""
    real = batch["attention_mask"].bool()
    return model(**batch, use_cache=False).logits[real].to(torch.promote_types(model.dtype, torch.float32))


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| relative to the largest |b|."""
    return float((a - b).abs().max() / b.abs().max())


def hooks_on(model: nn.Module) -> int:
    """How many forward hooks of any kind hang on any module."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
