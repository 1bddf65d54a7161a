"""The most likely answer and nothing else. What a generation config asks for besides is left out, and can be told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import BatchFeature, GenerationConfig, PreTrainedModel

from ..base.remote_code import MAX_CONFIG_BYTES
from ..base.untrusted import parse_object, read_bytes
from .vlm import running

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""What is kept of a generation config: where texts begin and end."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "prompt_lookup_num_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids"), ([],)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "constraints", "stop_strings"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "sequence_bias", "watermarking_config", "dola_layers"), ()),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "token_healing", "low_memory"), (False,)),
}
"""Entry of a generation config that changes which words are said -> values, beside null, with which it changes none."""

WHEN_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Entries that only count where do_sample is true."""


def asks_for(folder: Path) -> dict[str, Any]:
    """Returns what the generation_config.json of `folder`, where there is one, asks for beside the most likely words:
    entry -> value. InputError if that is no sound JSON file of the folder.
    """
    path = folder / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    config = parse_object(read_bytes(folder, path.name, MAX_CONFIG_BYTES), str(path))
    asked = {name: config[name] for name, neutral in NEUTRAL.items() if config.get(name) not in (None, *neutral)}
    if config.get("do_sample"):
        asked |= {name: config[name] for name in WHEN_SAMPLING if config.get(name) is not None}
    return asked


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
