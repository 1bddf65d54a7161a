"""Models to run, one in memory at a time."""

from __future__ import annotations

from dataclasses import replace

from ...export.checkpoint.headers import Checkpoint
from ...export.formats.lora import Adapted
from ...guard.model.vlm import VLM, load
from .adapted import attach


class Opened:
    """The model that is open: opened when it is first asked for, and let go when another is."""

    def __init__(self) -> None:
        self._weights: Checkpoint | Adapted | None = None
        self._vlm: VLM | None = None

    def __call__(self, weights: Checkpoint | Adapted) -> VLM:
        """Opens the model of `weights`, adapters on it where those are meant. Raises InputError if it cannot."""
        if self._vlm is None or self._weights is not weights:
            self.close()
            self._weights, self._vlm = weights, _load(weights)
        return self._vlm

    def close(self) -> None:
        """Lets go of the model."""
        self._weights = self._vlm = None


def _load(weights: Checkpoint | Adapted) -> VLM:
    if not isinstance(weights, Adapted):
        return load(weights.folder)
    vlm = load(weights.source.folder)
    return replace(vlm, model=attach(vlm.model, weights.place).get_base_model())
