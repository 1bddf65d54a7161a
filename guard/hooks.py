"""A guard at work in a running model: every intervention's own hooks, and none once the block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .guard import Guard
from .interventions.base import TextStates
from .model.roles import decoder_layers


@contextmanager
def attached(model: PreTrainedModel, guard: Guard, text: TextStates | None = None) -> Iterator[PreTrainedModel]:
    """This changes what `model` computes until the block ends; on exit, also by an exception, it is as it was.

    text: for interventions with `text_layers`, whose second pass it is; one `with` block serves one batch.  Raises
    InputError if the guard does not fit the model or an intervention is not given the text states that it needs.
    """
    guard.check_fits(len(decoder_layers(model)), model.config.get_text_config().hidden_size)
    handles: list[RemovableHandle] = []
    try:
        for intervention in guard.interventions:
            handles.extend(intervention.attach(model, text))
        yield model
    finally:
        for handle in handles:
            handle.remove()
