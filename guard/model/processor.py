"""A model's processor: found and made ready, and asked for model inputs in the form of prompt that is its own."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from ..base.errors import InputError
from ..base.remote_code import MAX_CONFIG_BYTES, trusted
from ..base.untrusted import parse_object, read_bytes
from .complaints import missing, own_words
from .processor_files import digest_of
from .prompt_forms import FORMS, Form

QUESTION = "How do people usually travel to work, and why do some of them prefer to walk?"

PicturedQuestion = tuple[str, Image.Image | None]
"""A question, and the picture that it comes with."""

SETTINGS: dict[str, tuple[str, ...]] = {
    "patch_size": ("vision_config", "patch_size"),
    "num_query_tokens": ("num_query_tokens",),
    "num_image_tokens": (),
    "image_seq_len": (),
    "image_seq_length": (),
}
"""What a processor class counts image tokens by, and where config.json has the same number, if it does."""

TEMPLATE_FILE = "chat_template.jinja"

REMEMBERED_BYTES = 2**26
"""Of tensors that prompts were encoded to: the same prompts are asked of the original, of every guard that is tried and
of the result, and processors take a third of the time of a small model.
"""

_files: WeakKeyDictionary[ProcessorMixin, bytes] = WeakKeyDictionary()
"""Processor -> digest of what it was made of."""

_remembered: dict[bytes, dict[str, Any]] = {}
"""Digest of files and prompts -> what they were encoded to: the first ones, as many as there is room for."""


def opened(folder: Path) -> ProcessorMixin:
    """Returns the processor in `folder` as transformers loads it, padding on the left; where it brings no chat
    template, with its tokenizer's. InputError if there is none, or it cannot be asked.
    """
    try:
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted())
    except Exception as error:  # foreign files can break a tokenizer in any way
        raise InputError(f"{folder}: transformers cannot load its processor ({own_words(error)})") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"{folder}: its processor has no tokenizer; put the published tokenizer's files beside it")
    form = form_of(processor)
    if form and form.needs and not find_spec(form.needs):
        raise InputError(f"{folder}: its processor cannot be used ({missing(form.needs)})")
    _check_settings(folder, processor)
    processor.chat_template = _template(folder, processor.chat_template or tokenizer.chat_template)
    if processor.chat_template is None and form is None:
        raise InputError(
            f"{folder}: its processor has no chat template ({TEMPLATE_FILE}, or chat_template in tokenizer_config.json)"
            "; add the one that the model was trained with"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _files[processor] = digest_of(folder)
    return processor


def form_of(processor: ProcessorMixin) -> Form | None:
    """Returns how `processor` is asked if not by chat template alone."""
    return FORMS.get(type(processor).__name__)


def _check_settings(folder: Path, processor: ProcessorMixin) -> None:
    """Raises InputError for a number that its class needs and its files do not have."""
    for name, place in SETTINGS.items():
        if getattr(processor, name, 0) is None:
            value: Any = parse_object(read_bytes(folder, "config.json", MAX_CONFIG_BYTES), str(folder / "config.json"))
            for key in place or (name,):
                value = value.get(key) if isinstance(value, dict) else None
            advice = f'add "{name}": {value}, as config.json has it' if isinstance(value, int) else f'add "{name}"'
            raise InputError(
                f"{folder / 'processor_config.json'}: has no {name}, by which image tokens are counted; {advice}"
            )


def _template(folder: Path, found: str | Mapping[str, str] | None) -> str | None:
    """Returns the chat template itself, of several that have names the default one."""
    if found is None or isinstance(found, str):
        return found
    if "default" not in found:
        named = ", ".join(sorted(found)) or "none"
        raise InputError(
            f"{folder}: of its chat templates ({named}) none is the default; write the one to use to {TEMPLATE_FILE}"
        )
    return found["default"]


def words_of(processor: ProcessorMixin, asked: PicturedQuestion) -> str:
    """One question as the processor is given it, up to where an answer begins. Raises whatever a chat template does."""
    form = form_of(processor)
    if form and processor.chat_template is None:
        return form.question.format(text=asked[0])
    words: str = _as_any(processor).apply_chat_template(_turns(asked), add_generation_prompt=True, tokenize=False)
    return words


def encoded(processor: ProcessorMixin, asked: Sequence[PicturedQuestion], where: Path) -> BatchFeature:
    """Returns the questions, all with a picture or none, as tensors padded to one length: what the processor's class
    makes of them, less labels to learn from. The tensors are shared with those who ask the same: change none.

    Raises InputError that begins with `where` if the processor cannot take them.
    """
    if processor not in _files:
        return _encoded(processor, asked, where)
    key = _digest_of(processor, asked)
    if key not in _remembered:
        batch = _encoded(processor, asked, where)
        if _bytes(batch.values()) + sum(_bytes(kept.values()) for kept in _remembered.values()) > REMEMBERED_BYTES:
            return batch
        _remembered[key] = dict(batch)
    return BatchFeature(dict(_remembered[key]))


def _digest_of(processor: ProcessorMixin, asked: Sequence[PicturedQuestion]) -> bytes:
    digest = hashlib.sha256(_files[processor])
    for text, picture in asked:
        digest.update(repr((text, picture and (picture.mode, picture.size))).encode())
        digest.update(picture.tobytes() if picture else b"")
    return digest.digest()


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _encoded(processor: ProcessorMixin, asked: Sequence[PicturedQuestion], where: Path) -> BatchFeature:
    try:
        form = form_of(processor)
        with torch.inference_mode(False):  # whoever asks the same again may want gradients
            batch = _formed(processor, form, asked) if form else _templated(processor, asked)
    except MemoryError:
        raise
    except Exception as error:  # untrusted numbers and words can break a processor in any way
        raise InputError(f"{where}: its processor cannot take a prompt ({own_words(error)})") from error
    missing = {"input_ids", "attention_mask"} - set(batch)
    if missing:
        raise InputError(f"{where}: its processor makes no {min(missing)} of a prompt")
    batch.pop("labels", None)
    return batch


def _templated(processor: ProcessorMixin, asked: Sequence[PicturedQuestion]) -> BatchFeature:
    batch: BatchFeature = _as_any(processor).apply_chat_template(
        [_turns(question) for question in asked],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",  # SmolVLM's own method takes nothing else for it
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    return batch


def _formed(processor: ProcessorMixin, form: Form, asked: Sequence[PicturedQuestion]) -> BatchFeature:
    words = [words_of(processor, question) for question in asked]
    pictures = [picture for _, picture in asked if picture is not None]
    taking, common = _as_any(processor), {"padding": True, "return_tensors": "pt"}
    if pictures or form.alone is None:
        known = inspect.signature(type(processor).__call__).parameters
        options = {name: value for name, value in form.options.items() if name in known}
        made = taking(text=words, images=pictures or None, **common, **options)
    else:
        begin = taking.tokenizer.bos_token or ""
        alone = [form.alone.format(bos=begin, words=word) for word in words]
        made = taking.tokenizer(alone, return_token_type_ids=True, **common)
    return BatchFeature(dict(made))


def _turns(asked: PicturedQuestion) -> list[dict[str, Any]]:
    text, picture = asked
    image = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]


def _as_any(processor: Any) -> Any:
    return processor
