"""The most likely answer and nothing else, whatever a generation config asks for besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import BatchFeature, GenerationConfig, PreTrainedModel

from .generation import ENDS
from .vlm import running


@contextmanager
def plainly(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, `model`, and a language model in it that generates for it, go by a generation config that
    says where texts begin and end and nothing else.
    """
    before: dict[Any, GenerationConfig] = {
        module: config
        for module in model.modules()
        if isinstance(config := getattr(module, "generation_config", None), GenerationConfig)
    }
    try:
        for module, config in before.items():
            module.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in ENDS})
        yield
    finally:
        for module, config in before.items():
            module.generation_config = config


def most_likely(model: Any, inputs: BatchFeature, most: int, **options: Any) -> Any:
    """Returns what `model.generate` returns of the most likely words, up to `most` new tokens for each row of `inputs`,
    whatever the generation config asks for. options: of `generate`. InputError for what untrusted numbers break.
    """
    with running(model), plainly(model):
        return model.generate(**inputs, do_sample=False, max_new_tokens=most, **options)
