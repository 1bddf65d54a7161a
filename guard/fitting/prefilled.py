"""Prompts run up to their last token and kept, so that what is decided there is found at the cost of one token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, DynamicCache

from ..model.vlm import running
from ..prompts.prompts import positions
from .states import forward

PER_TOKEN = ("input_ids", "attention_mask")


@dataclass
class Prefilled:
    """One batch of prompts: `inputs` as `encode` makes them, and the cache of all positions but the last.

    cache: None where a model keeps its past in another way than as keys and values by position, or tells positions of
    pictures apart; its prompts are then run whole every time.
    """

    inputs: BatchFeature
    cache: DynamicCache | None

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any, inputs: BatchFeature) -> Prefilled:
        """Runs `inputs` up to their last token, with whatever hooks are on `model`."""
        if hasattr(model.base_model, "get_rope_index") or set(inputs) - {*PER_TOKEN, "pixel_values"}:
            return cls(inputs, None)
        before = {name: each[:, :-1] if name in PER_TOKEN else each for name, each in inputs.items()}
        cache = getattr(forward(model.base_model, BatchFeature(before), use_cache=True), "past_key_values", None)
        kept = type(cache) is DynamicCache and cache.get_seq_length() == inputs["input_ids"].shape[1] - 1
        return cls(inputs, cache if kept else None)

    @torch.inference_mode()
    def decide(self, model: Any, whole: bool = False) -> Tensor:
        """Returns the most likely first token of each answer, [batch], with the hooks that are on `model` now.

        whole: whether hooks act at other positions too, so that all of them have to be run again.
        """
        if self.cache is None or whole:
            logits: Tensor = forward(model, self.inputs, logits_to_keep=1).logits
        else:
            last = {"input_ids": self.inputs["input_ids"][:, -1:], "position_ids": positions(self.inputs)[:, -1:]}
            with running(model):
                logits = model(
                    **last,
                    attention_mask=self.inputs["attention_mask"],
                    past_key_values=copy.deepcopy(self.cache),
                    logits_to_keep=1,
                ).logits
        return logits[:, -1].argmax(-1).cpu()
