"""generation_config.json: how a model is asked to go from one word to the next. Read, checked, told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..base.errors import InputError
from ..base.remote_code import MAX_CONFIG_BYTES
from ..base.untrusted import parse_object, printable, read_bytes
from .complaints import own_words

GENERATION = "generation_config.json"
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Entries that say where texts begin and end: a word's number, or a list of them."""

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

NUMBERS = (*WHEN_SAMPLING, *(name for name, neutral in NEUTRAL.items() if neutral in ((0,), (1,))))
"""Entries that are numbers, or true or false."""


def asks_for(folder: Path) -> dict[str, Any]:
    """Returns what the generation_config.json of `folder`, where there is one, asks for beside the most likely words:
    entry -> value. InputError if that is no sound JSON file of the folder.
    """
    config = _read(folder)
    asked = {name: config[name] for name, neutral in NEUTRAL.items() if config.get(name) not in (None, *neutral)}
    if config.get("do_sample"):
        asked |= {name: config[name] for name in WHEN_SAMPLING if config.get(name) is not None}
    return asked


def check_generation(folder: Path) -> None:
    """Raises InputError, naming the entry where one can be named, unless generation_config.json of `folder`, if there
    is one, is such that transformers takes it and its words and numbers are some.
    """
    path, config = folder / GENERATION, _read(folder)
    wrong = [(name, "the number of a word") for name in ENDS if not _words(config.get(name))]
    wrong += [(name, "a number or a truth") for name in NUMBERS if not isinstance(config.get(name), int | float | None)]
    for name, wanted in wrong:
        shown = printable(repr(config[name]))
        raise InputError(f"{path}: {name} is {shown}, not {wanted}; correct or remove the entry")
    try:
        GenerationConfig.from_dict(config)
    except Exception as error:  # untrusted entries can break a constructor in any way
        reason = own_words(error)
        raise InputError(
            f"{path}: transformers does not take it ({reason}); correct or remove what it names"
        ) from error


def _words(value: Any) -> bool:
    return all(each is None or type(each) is int for each in (value if isinstance(value, list) else [value]))


def _read(folder: Path) -> dict[str, Any]:
    """Returns the file's entries, none where there is no file."""
    if not os.path.lexists(folder / GENERATION):
        return {}
    return parse_object(read_bytes(folder, GENERATION, MAX_CONFIG_BYTES), str(folder / GENERATION))
