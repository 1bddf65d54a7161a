"""What each intervention means: hooks on a running model. Every fold is tested against these few lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .base.errors import InputError
from .guard import Guard
from .interventions.kinds import Gate, LinearGate, ResidualProjection, SharedProjection, SublayerProjection, TwoPass
from .model.roles import decoder_layers, mlp_parts, output_tensor, residual_readers, sublayers, with_output_tensor

TextStates = Mapping[int, Tensor]
"""layer -> h_l(q), [batch, d]: the last prompt token's states in a text-only pass (states.text_states)."""


def project_out(states: Tensor, basis: Tensor, strength: float) -> Tensor:
    """h - strength (h V^T) V: `states` [..., d] without that share of span(basis), [m, d]; float32 or better inside."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    basis = basis.to(wide)
    return (wide - strength * (wide @ basis.T) @ basis).to(states.dtype)


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda _module, _args, output: with_output_tensor(output, change(output_tensor(output)))


def _sublayers(model: PreTrainedModel, each: SublayerProjection, _text: TextStates | None) -> Iterator[RemovableHandle]:
    for layer, basis in each.bases.items():
        hook = _on_output(lambda y, basis=basis: project_out(y, basis, each.strength))  # type: ignore[misc]
        for module in sublayers(decoder_layers(model)[layer]).values():
            yield module.register_forward_hook(hook)


def _shared(model: PreTrainedModel, each: SharedProjection, _text: TextStates | None) -> Iterator[RemovableHandle]:
    def project(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (project_out(args[0], each.basis, each.strength), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": project_out(kwargs["hidden_states"], each.basis, each.strength)}

    for reader in residual_readers(model):
        yield reader.register_forward_pre_hook(project, with_kwargs=True)


def steer(states: Tensor, basis: Tensor, strength: float, alpha: float) -> Tensor:
    """h - (strength - alpha g) (h V^T) V with g = 1[h . v_1 > 0]: `states` [..., d]; `basis` [m, d], row 0 = v_1."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    basis = basis.to(wide)
    along = wide @ basis.T
    gate = (along[..., :1] > 0).to(wide)
    return (wide - (strength - alpha * gate) * along @ basis).to(states.dtype)


def _residual(model: PreTrainedModel, each: ResidualProjection, _text: TextStates | None) -> Iterator[RemovableHandle]:
    for layer, basis in each.bases.items():
        hook = _on_output(lambda h, basis=basis: steer(h, basis, each.strength, each.alpha))  # type: ignore[misc]
        yield decoder_layers(model)[layer].register_forward_hook(hook)


def ramp(x: Tensor, gate: Gate, act: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
    """How far `gate` opens at MLP inputs `x` [..., d]: [...], 0 (shut) to 1 (open); float32 or better inside.

    act: the MLP's activation.  gated: whether the MLP multiplies its activation with a second linear map, so that
    without biases the ramp comes times k.x.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    score = x @ gate.detector.to(x)
    one = torch.ones_like(score) if gate.unit is None else x @ gate.unit.to(x)
    below, above = score - gate.t0 * one, score - gate.t1 * one
    if math.isinf(gate.beta):
        opened = below.relu() - above.relu()
    else:
        opened = (act(gate.beta * below) - act(gate.beta * above)) / gate.beta
    return opened / (gate.t1 - gate.t0) * (one if gated else 1.0)


def _gate(model: PreTrainedModel, each: Gate, _text: TextStates | None) -> Iterator[RemovableHandle]:
    parts = mlp_parts(decoder_layers(model)[each.layer])
    silenced, opened = list(each.recycled), torch.zeros(())

    def read(_module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal opened
        opened = ramp(args[0], each, parts.act, parts.gated)

    def silence(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        neurons = args[0].clone()
        neurons[..., silenced] = 0
        return (neurons, *args[1:])

    def write(output: Tensor) -> Tensor:
        return (output + opened[..., None] * each.column.to(opened)).to(output.dtype)

    yield parts.gate.register_forward_pre_hook(read)
    if silenced:
        yield parts.down.register_forward_pre_hook(silence)
    yield parts.output.register_forward_hook(_on_output(write))


def _linear_gate(model: PreTrainedModel, each: LinearGate, _text: TextStates | None) -> Iterator[RemovableHandle]:
    parts, opened = mlp_parts(decoder_layers(model)[each.layer]), torch.zeros(())
    if parts.down.in_features != len(each.readout):
        raise InputError(
            f"{each.kind}: reads {len(each.readout)} neurons, layer {each.layer} of the model has "
            f"{parts.down.in_features}"
        )

    def read(_module: Any, args: tuple[Tensor, ...]) -> None:
        nonlocal opened
        neurons = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        opened = neurons @ each.readout.to(neurons)

    def write(output: Tensor) -> Tensor:
        return (output + opened[..., None] * each.column.to(opened)).to(output.dtype)

    yield parts.down.register_forward_pre_hook(read)
    yield parts.output.register_forward_hook(_on_output(write))


def _two_pass(model: PreTrainedModel, each: TwoPass, text: TextStates | None) -> Iterator[RemovableHandle]:
    if text is None:
        raise InputError("the two-pass guard needs the text-only states of the batch: attached(model, guard, text=...)")
    for layer, basis in each.bases.items():
        wide = text[layer].float()
        steered = wide @ basis.T.to(wide)  # [batch, m]: h_l(q) V^T
        gate = (steered[:, :1] > 0).float()  # g_l, [batch, 1]
        change = _LastPromptToken(basis, each, gate * steered)
        yield decoder_layers(model)[layer].register_forward_hook(_on_output(change))


class _LastPromptToken:
    """Adds alpha g_l h_l(q) V^T V at the last prompt token: in the prefill, not in the cached steps that follow it.

    The first call sees the whole (left-padded) prompt and so tells where its last token is; without a KV cache every
    later call repeats that position, with one it does not reach it again.
    """

    def __init__(self, basis: Tensor, each: TwoPass, coefficients: Tensor) -> None:
        self.basis, self.each, self.coefficients = basis, each, coefficients
        self.position: int | None = None

    def __call__(self, states: Tensor) -> Tensor:
        if self.position is None:
            self.position = states.shape[1] - 1
        if self.each.project:
            states = project_out(states, self.basis, 1.0)
        if states.shape[1] <= self.position:
            return states
        states = states.clone()
        steering = self.each.alpha * self.coefficients @ self.basis.to(self.coefficients)  # [batch, d]
        states[:, self.position] += steering.to(states)
        return states


_INSTALL: dict[type, Callable[..., Iterator[RemovableHandle]]] = {
    SublayerProjection: _sublayers,
    SharedProjection: _shared,
    ResidualProjection: _residual,
    Gate: _gate,
    LinearGate: _linear_gate,
    TwoPass: _two_pass,
}


@contextmanager
def attached(model: PreTrainedModel, guard: Guard, text: TextStates | None = None) -> Iterator[PreTrainedModel]:
    """This changes what `model` computes until the block ends; on exit, also by an exception, it is as it was.

    text: only for TwoPass, whose second pass it is; one `with` block serves one batch.  Raises InputError if the guard
    does not fit the model or TwoPass is given no text states.
    """
    guard.check_fits(len(decoder_layers(model)), model.config.get_text_config().hidden_size)
    handles: list[RemovableHandle] = []
    try:
        for each in guard.interventions:
            handles.extend(_INSTALL[type(each)](model, each, text))
        yield model
    finally:
        for handle in handles:
            handle.remove()
