"""The two graphs every family shares: the embedding table, and the decoder with its key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .names import BATCH, DEEPSTACK, PAST, SEQUENCE, TOTAL
from .trace import Port, Sketch
from .vision import VisionPath

_B, _S, _P = 2, 3, 5
"""Example sizes: distinct, and neither 0 nor 1, which tracing takes for constants."""


class Embed(nn.Module):
    """input_ids [batch, positions] -> inputs_embeds [batch, positions, d], float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids).float()


class Merged(Embed):
    """The same with image_features [image tokens, d] in the places of the image tokens, in their order."""

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:  # type: ignore[override]
        words, place = super().forward(input_ids), input_ids == self.model.config.image_token_id
        number = (place.flatten().long().cumsum(0) - 1).clamp(min=0)
        padded = torch.cat([image_features, image_features.new_zeros(1, image_features.shape[1])])  # there may be none
        return torch.where(place[..., None], padded[number].view(words.shape), words)


class Decoder(nn.Module):
    """Embeddings, mask, positions, past -> logits [batch, positions, vocabulary] in float32, then keys and values."""

    def __init__(self, path: VisionPath) -> None:
        super().__init__()
        self.path = path

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor], **deep: Any
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        embeds = inputs_embeds.to(self.path.model.dtype)
        logits = self.path.decode(embeds, attention_mask, position_ids, cache, *deep.values())
        layers: Any = cache.layers
        return (logits.float(), *(cached for layer in layers for cached in (layer.keys, layer.values)))


class DeepDecoder(Decoder):
    """The same with deepstack_features [levels, batch, positions, d], added to the stream after the first layers."""

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
        deepstack_features: Tensor,
    ) -> tuple[Tensor, ...]:
        return super().forward(inputs_embeds, attention_mask, position_ids, past, deep=deepstack_features)


def embed_sketch(model: PreTrainedModel) -> Sketch:
    port = Port(torch.zeros(_B, _S, dtype=torch.long), {0: BATCH, 1: SEQUENCE})
    return Sketch(Embed(model), {"input_ids": port}, ["input_ids"], ["inputs_embeds"])


def merged_sketch(model: PreTrainedModel) -> Sketch:
    width = model.config.get_text_config().hidden_size
    ids = Port(torch.zeros(_B, _S, dtype=torch.long), {0: BATCH, 1: SEQUENCE})
    inputs = {"input_ids": ids, "image_features": Port(torch.zeros(_P, width), {0: "num_image_tokens"})}
    return Sketch(Merged(model), inputs, list(inputs), ["inputs_embeds"])


def cache_names(which: str, layers: int) -> list[str]:
    """Returns `which` is past_key_values or present."""
    return [f"{which}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def decoder_sketch(path: VisionPath) -> Sketch:
    """Returns the decoder of `path`'s model, with the inputs that this path feeds it."""
    config = path.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    past = torch.zeros(_B, heads, _P, size, dtype=path.model.dtype)
    rows = () if path.position_rows is None else (path.position_rows,)
    first, layers = len(rows), config.num_hidden_layers
    inputs: dict[str, Any] = {
        "inputs_embeds": Port(torch.zeros(_B, _S, config.hidden_size), {0: BATCH, 1: SEQUENCE}),
        "attention_mask": Port(torch.ones(_B, _P + _S, dtype=torch.long), {0: BATCH, 1: TOTAL}),
        "position_ids": Port(torch.zeros(*rows, _B, _S, dtype=torch.long), {first: BATCH, first + 1: SEQUENCE}),
    }
    names = [*inputs, *cache_names("past_key_values", layers)]
    inputs["past"] = [Port(past, {0: BATCH, 2: PAST})] * (2 * layers)
    if path.levels:
        port = Port(torch.zeros(path.levels, _B, _S, config.hidden_size), {1: BATCH, 2: SEQUENCE})
        inputs[DEEPSTACK] = port
        names.append(DEEPSTACK)
    module = (DeepDecoder if path.levels else Decoder)(path)
    return Sketch(module, inputs, names, ["logits", *cache_names("present", layers)])
