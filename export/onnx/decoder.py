"""The two graphs every family shares: the embedding table, and the decoder with its key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .trace import Port, Sketch

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
"""transformers.js resolves these, and for an empty cache nothing but batch_size."""

_B, _S, _P = 2, 3, 5
"""Example sizes: distinct, and neither 0 nor 1, which tracing takes for constants."""


class Embed(nn.Module):
    """input_ids [batch, positions] -> inputs_embeds [batch, positions, d], float32; unscaled where the model scales."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(input_ids).float()


class Decoder(nn.Module):
    """inputs_embeds, mask, positions, past -> logits [batch, positions, vocabulary] in float32, then keys and values."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        out: Any = self.model(
            inputs_embeds=inputs_embeds.to(self.model.dtype),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
        )
        present = [each for layer in out.past_key_values.layers for each in (layer.keys, layer.values)]
        return (out.logits.float(), *present)


def embed_sketch(model: PreTrainedModel) -> Sketch:
    port = Port(torch.zeros(_B, _S, dtype=torch.long), {0: BATCH, 1: SEQUENCE})
    return Sketch(Embed(model), {"input_ids": port}, ["input_ids"], ["inputs_embeds"])


def cache_names(which: str, layers: int) -> list[str]:
    """`which` is past_key_values or present."""
    return [f"{which}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def decoder_sketch(model: PreTrainedModel, position_rows: int | None) -> Sketch:
    """position_rows: rows of position_ids where they come in several (3 in multimodal rotary positions), else None."""
    config = model.config.get_text_config()
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = torch.zeros(_B, heads, _P, size, dtype=model.dtype)
    rows = () if position_rows is None else (position_rows,)
    first = len(rows)
    inputs: dict[str, Any] = {
        "inputs_embeds": Port(torch.zeros(_B, _S, config.hidden_size), {0: BATCH, 1: SEQUENCE}),
        "attention_mask": Port(torch.ones(_B, _P + _S, dtype=torch.long), {0: BATCH, 1: TOTAL}),
        "position_ids": Port(torch.zeros(*rows, _B, _S, dtype=torch.long), {first: BATCH, first + 1: SEQUENCE}),
        "past": [Port(past, {0: BATCH, 2: PAST})] * (2 * config.num_hidden_layers),
    }
    layers = config.num_hidden_layers
    names = [*list(inputs)[:-1], *cache_names("past_key_values", layers)]
    return Sketch(Decoder(model), inputs, names, ["logits", *cache_names("present", layers)])
