"""A language model's parts by role: decoder layers, attentions, MLPs, norms that read, whatever a family calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.errors import InputError

LAYER_LISTS = ("layers", "blocks", "h")
ATTENTION_NAMES = (
    *("self_attn", "cross_attn", "linear_attn", "attention", "self_attention"),
    *("conv", "mamba", "mixer"),
)
MLP_NAMES = (
    *("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "fc2"),
    *("experts", "per_layer_projection", "ffn"),
)
SHARED_EXPERT_NAMES = ("shared_expert", "shared_experts")
"""Where an MLP of experts keeps the dense one that every token passes through."""

SHARE_NAME = "shared_expert_gate"
"""What gives the logit of the shared expert's share in the output, in the families that weigh it."""

MLP_LINEARS: tuple[tuple[str, str | None, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("fc1", None, "fc2"),
)
"""Attributes of a dense MLP: (gate, up, down) where it is gated, (first, None, second) where it is plain."""

ACTIVATION_NAMES = ("act_fn", "activation_fn")
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "embedding_norm", "ln_f", "norm_f", "layer_norm")
SKIPPED_LAYERS = ("cross_attention_layers",)
"""What text configs call the layers that look at pictures and nothing else; a pass without one goes past them."""

EXTRA_LAYER_LISTS = ("gated_cross_attn_layers",)
"""Blocks between the decoder layers that read the residual stream and write to it."""


def decoder(model: PreTrainedModel) -> Any:
    """Returns the module that holds the language model's layers and their final norm. InputError where none is
    found.
    """
    found: Any = model
    while not any(isinstance(getattr(found, name, None), nn.ModuleList) for name in LAYER_LISTS):
        inner = found.get_decoder() if hasattr(found, "get_decoder") else found
        inner = getattr(found, "model", found) if inner is found else inner
        if inner is found:
            raise InputError(f"{type(model).__name__}: no decoder layers found in it")
        found = inner
    return found


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the language model's decoder layers, first to last."""
    found = decoder(model)
    return list(getattr(found, next(name for name in LAYER_LISTS if hasattr(found, name))))


def skipped_on_text(model: PreTrainedModel) -> frozenset[int]:
    """Returns the decoder layers that a pass without a picture does not run: it leaves the residual stream there as it
    is.
    """
    text = model.config.get_text_config()
    return frozenset(layer for name in SKIPPED_LAYERS for layer in getattr(text, name, None) or ())


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    raise InputError(f"{type(module).__name__} has none of the modules {', '.join(names)}")


def sublayers(layer: nn.Module) -> dict[str, nn.Module]:
    """Returns name -> module, of a decoder layer's attention and MLP (in OPT, its second linear): what they return
    (first, if it is a tuple) is what they write. A hybrid's convolution or state-space mixer counts as attention.
    """
    named = {name: getattr(layer, name, None) for name in (*ATTENTION_NAMES, *MLP_NAMES)}
    return {name: module for name, module in named.items() if isinstance(module, nn.Module)}


@dataclass(frozen=True)
class MLPParts:
    """A dense MLP taken apart: down(act(gate x) * up x) if it is gated, else down(act(gate x)); `up` is then None."""

    output: nn.Module
    """What returns the MLP's output: the module `mlp` gives."""
    sublayer: nn.Module
    """What writes to the residual stream: the same, or the mixture of experts that it is the shared expert of."""
    gate: nn.Linear
    up: nn.Linear | None
    down: nn.Linear
    act: Callable[[Tensor], Tensor]
    share: nn.Module | None = None
    """What returns, before a sigmoid, what the output of a shared expert is multiplied with in `sublayer`."""

    @property
    def gated(self) -> bool:
        return self.up is not None

    @property
    def biased(self) -> bool:
        """Whether its neurons have biases, which a gate's thresholds need (else they take its bias-free form)."""
        return self.gate.bias is not None and (self.up is None or self.up.bias is not None)


def mlp_parts(layer: nn.Module) -> MLPParts:
    """Returns the dense MLP of a decoder layer by role, or the shared expert among its experts; InputError without
    either.
    """
    mlps = [module for name in MLP_NAMES if isinstance(module := getattr(layer, name, None), nn.Module)]
    named = [(getattr(mlp, name, None), mlp) for mlp in mlps for name in SHARED_EXPERT_NAMES]
    held = [(expert, mlp) for expert, mlp in named if isinstance(expert, nn.Module)]
    own = [(mlp, mlp) for mlp in mlps]
    for module, sublayer in (*own, *held, *((layer, mlp) for mlp in mlps[:1])):  # OPT keeps its linears in the layer
        for gate, up, down in MLP_LINEARS:
            if all(isinstance(getattr(module, name, None), nn.Linear) for name in (gate, down)):
                act = next((getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)), None)
                linears = (getattr(module, gate), getattr(module, up) if up else None, getattr(module, down))
                share = None if module in (sublayer, layer) else getattr(sublayer, SHARE_NAME, None)
                output = sublayer if module is layer else module
                return MLPParts(output, sublayer, *linears, act or F.silu, share)
    raise InputError(f"{type(layer).__name__} has no dense MLP of a known shape; a gate cannot be folded there")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Returns the norm between the last decoder layer and the language model's head."""
    return _child(decoder(model), FINAL_NORM_NAMES)


def residual_readers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns every module that reads the residual stream: each layer's norms before its sublayers, or, in a layer
    without such norms, the sublayers themselves; and the final norm.
    """
    extra = [block for name in EXTRA_LAYER_LISTS for block in getattr(decoder(model), name, ())]
    return [*(reader for layer in (*decoder_layers(model), *extra) for reader in _readers(layer)), final_norm(model)]


def _readers(layer: nn.Module) -> list[nn.Module]:
    """post_attention_layernorm reads the stream for the MLP where it is the only norm between the two sublayers; beside
    a norm called pre_..., or without any norm before the attention, it norms what the attention wrote.
    """
    norms = {name: child for name, child in layer.named_children() if "norm" in name.lower()}
    before = [norm for name, norm in norms.items() if not name.startswith("post_")]
    if before and not any(name.startswith("pre_") for name in norms) and "post_attention_layernorm" in norms:
        before.append(norms["post_attention_layernorm"])
    return before or list(sublayers(layer).values())


def output_tensor(output: Tensor | tuple[Any, ...]) -> Tensor:
    """Returns a module's hidden states, whether it returns them alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_output_tensor(output: Tensor | tuple[Any, ...], tensor: Tensor) -> Tensor | tuple[Any, ...]:
    """Returns `output` with its hidden states replaced by `tensor`."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor
