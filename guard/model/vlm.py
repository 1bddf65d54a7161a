"""A vision-language model, its config and its processor: found by name, checked before transformers reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..base.container import free_memory, multiplies_bfloat16, processors
from ..base.errors import InputError, Refused
from ..base.hub import download, is_hub_id, split_revision
from ..base.limits import memory_limited
from ..base.remote_code import MAX_CONFIG_BYTES, check_code, trusted
from ..base.untrusted import check_files, parse_object, read_bytes
from .complaints import own_words
from .generation import check_generation
from .loading import check_loading
from .processor import opened
from .roles import decoder_layers
from .trial import trying

ALIASES = {
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "vip-llava": "llava-hf/vip-llava-7b-hf",
    "video-llava": "LanguageBind/Video-LLaVA-7B-hf",
    "qwen2-vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl": "Qwen/Qwen3-VL-8B-Instruct",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
    "idefics2": "HuggingFaceM4/idefics2-8b",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM-Instruct",
    "paligemma": "google/paligemma-3b-mix-224",
    "paligemma2": "google/paligemma2-3b-mix-224",
    "gemma3": "google/gemma-3-4b-it",
    "pixtral": "mistral-community/pixtral-12b",
    "mistral-small": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "llama-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "aya-vision": "CohereLabs/aya-vision-8b",
    "aria": "rhymes-ai/Aria",
    "granite-vision": "ibm-granite/granite-vision-3.3-2b",
    "lfm2-vl": "LiquidAI/LFM2-VL-1.6B",
    "glm-4.1v": "zai-org/GLM-4.1V-9B-Thinking",
    "blip2": "Salesforce/blip2-opt-2.7b",
    "instructblip": "Salesforce/instructblip-vicuna-7b",
    "deepseek-vl": "deepseek-community/deepseek-vl-7b-chat",
    "janus": "deepseek-community/Janus-Pro-7B",
    "ovis2": "thisisiron/Ovis2-8B-hf",
    "fuyu": "adept/fuyu-8b",
}
DEMO_NAME = "demo"
DEMO_FOLDER = Path(str(files("guardfold") / "validators" / "demo" / "model"))
"""Name and folder of the small model that comes with the package, and is trusted as the package is."""

OTHER_CLASSES: dict[str, Any] = {"phi4_multimodal": AutoModelForMultimodalLM}
"""Model type -> auto class, for vision-language models that AutoModelForImageTextToText does not know."""

OWN_CLASSES: tuple[Any, ...] = (
    *(AutoModelForImageTextToText, AutoModelForMultimodalLM),
    *(AutoModelForCausalLM, AutoModel),
)
"""Auto classes for which a model's own code may name its class with a head, in the order in which they are tried."""

IMAGE_TOKENS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
"""What configs call the word that stands for an image feature."""

SMALL_BYTES = 64 * 2**20
BATCH_SIZES = {50e6: 64, 2e9: 32}
"""Models of fewer parameters -> prompts a batch."""

PROMPT_TOKENS, ANSWER_TOKENS = 1024, 64
"""Of a picture and a question, and of an answer, for what a batch is allowed to hold."""

PASSING = 16
"""Numbers a token and unit of width that a layer has at hand while it runs; keys and values of all layers stay."""

MAX_NUMBERS = {
    **{"layer": 1024, "layers": 1024, "depth": 1024, "depths": 1024, "experts": 1024, "attention_types": 1024},
    **{"heads": 4096, "image_size": 4096, "labels": 2**16, "size": 2**22, "positions": 2**24, "embeddings": 2**24},
}
"""End of a key in config.json -> the largest number it may have: far above any model, far below exhausting memory."""

MAX_NUMBER = 2**32
BUFFER_BYTES = 2**31
"""Of address space that building a model without its weights may take: its buffers, and libraries that it loads."""

READ_SUFFIXES = (".json", ".jsonl", ".jinja", ".model", ".txt", ".safetensors")
"""Of files that transformers may open in a model folder, and of the prompts that lie there."""


@dataclass(frozen=True)
class VLM:
    """A loaded model with the processor that belongs to it, and the folder both came from."""

    model: PreTrainedModel
    processor: ProcessorMixin
    folder: Path

    @property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    @property
    def width(self) -> int:
        """d, the size of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the parameters, or to the CPU where those are not loaded (streamed models)."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    @cached_property
    def batch_size(self) -> int:
        """Prompts a batch: many for a model that fits in a cache, few for one that fills a card, and on the CPU no more
        than what is left of the memory takes, of the container's too.
        """
        size = sum(p.numel() for p in self.model.parameters())
        suits = next((count for most, count in BATCH_SIZES.items() if size < most), 8)
        if self.device.type != "cpu":
            return suits
        text = self.model.config.get_text_config()
        states = PROMPT_TOKENS * self.width * (2 * len(self.layers) + PASSING)
        logits = ANSWER_TOKENS * getattr(text, "vocab_size", 0)
        return max(1, min(suits, free_memory() // (4 * (states + logits))))


def located(name: str) -> Path | tuple[str, str | None]:
    """Returns the folder that `name` is, the demo's if that is meant, or the (hub id, revision) that it stands for."""
    if name == DEMO_NAME:
        return DEMO_FOLDER
    if Path(name).is_dir():
        return Path(name)
    given, revision = split_revision(name)
    hub_id = ALIASES.get(given, given)
    if not is_hub_id(hub_id):
        known = ", ".join([DEMO_NAME, *ALIASES])
        raise InputError(f"{name}: no such folder; give a model folder, a hub id (owner/name) or one of {known}")
    return hub_id, revision


def resolve(name: str) -> tuple[Path, str]:
    """Returns (folder, source) of `name`: the demo, a folder, an alias or a hub id (@REVISION), downloaded if need be.

    `source` is what the manifest calls the model: the alias's hub id, the hub id, or the folder's name.
    """
    found = located(name)
    if isinstance(found, Path):
        return found, DEMO_NAME if name == DEMO_NAME else found.resolve().name
    return download(*found), found[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`, checked to be a vision-language model's; InputError otherwise."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise InputError(f"{folder}: no config.json; --model takes a folder in the Hugging Face layout")
    check_files(folder, READ_SUFFIXES)
    config = parse_object(read_bytes(folder, path.name, MAX_CONFIG_BYTES), str(path))
    check_code(folder)
    check_loading(folder, config)
    check_generation(folder)
    _check_type(folder, config)
    _check_numbers(path, config)
    return config


def _check_type(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError unless transformers knows the model type, or code of the model's own (then trusted)
    brings it.
    """
    if not isinstance(config.get("auto_map", {}), dict):
        raise InputError(f"{folder / 'config.json'}: auto_map is not an object")
    if str(config.get("model_type")) in {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *OTHER_CLASSES}:
        return
    where = f"{folder}: model_type {config.get('model_type')!r} is not a vision-language model that transformers knows"
    if "auto_map" not in config:
        raise InputError(where)
    if "AutoConfig" not in config["auto_map"] or _own_class(config) is None:
        names = ", ".join(own_class.__name__ for own_class in OWN_CLASSES)
        raise InputError(f"{where}, and its auto_map names no AutoConfig or none of {names}")


def _check_numbers(where: Path, value: Any, key: str = "") -> None:
    """Raises InputError for a number that would make a model of any size before a tensor contradicts it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(where, inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(where, inner, key)
    elif isinstance(value, int):
        limit = next((limit for end, limit in MAX_NUMBERS.items() if key.endswith(end)), MAX_NUMBER)
        if not -limit <= value <= limit:
            raise InputError(f"{where}: {key} is {value}, the limit is {limit}")


def auto_class(config: Mapping[str, Any]) -> Any:
    """Returns the auto class that builds and loads the vision-language model of a config.json."""
    return _own_class(config) or OTHER_CLASSES.get(config["model_type"], AutoModelForImageTextToText)


def _own_class(config: Mapping[str, Any]) -> Any:
    """Returns the auto class by which code of the model's own is loaded; None where it names none with a head."""
    return next((own_class for own_class in OWN_CLASSES if own_class.__name__ in config.get("auto_map", ())), None)


def check_weights(folder: Path) -> None:
    """Raises InputError unless `folder` holds safetensors weights; pickles are never opened."""
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{folder}: only pickled weights (.bin/.pt), which are not opened; "
            "convert them first: load and save_pretrained with transformers in a sandbox"
        )
    raise InputError(f"{folder}: no *.safetensors weights")


def load(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> VLM:
    """Returns the model and processor in `folder`: on the GPU in bfloat16 where there is one, else on the CPU, in
    bfloat16 where large weights are kept so and the CPU has matrix units for it, else in float32.

    Raises InputError if the folder is not a vision-language model with safetensors weights and a processor.
    """
    read_config(folder)
    with _tried(folder) as end:  # beside the loading of weights
        model = load_model(folder, device, dtype)
        end()
    return VLM(model, opened(folder), folder)


def load_model(folder: Path, device: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Returns the model in `folder` alone, as `load` loads it, whatever its processor."""
    config = read_config(folder)
    check_weights(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (
        torch.bfloat16 if device.startswith("cuda") or _quick_in_bfloat16(folder, config) else torch.float32
    )
    try:
        loaded: Any = auto_class(config).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trusted(),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are said below
        )
    except Exception as error:  # foreign files can break a constructor in any way
        raise InputError(f"{folder}: transformers cannot load it ({own_words(error)})") from error
    model, info = loaded
    for name, held, wanted in sorted(info["mismatched_keys"], key=str):
        raise InputError(f"{folder}: {name} has shape {list(held)}, config.json says {list(wanted)}")
    if info["missing_keys"]:
        raise InputError(f"{folder}: the checkpoint lacks {min(info['missing_keys'])}")
    model = model.eval().to(device)
    return cast(PreTrainedModel, model)


def _quick_in_bfloat16(folder: Path, config: Mapping[str, Any]) -> bool:
    kept = config.get("dtype", config.get("torch_dtype"))
    return kept == "bfloat16" and not _small(folder) and multiplies_bfloat16()


def _small(folder: Path) -> bool:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) < SMALL_BYTES


def load_processor(folder: Path) -> ProcessorMixin:
    """Returns the processor in `folder`, padding on the left; InputError if there is none or it fails on a short
    question.
    """
    with _tried(folder) as end:
        end()
    return opened(folder)


def _tried(folder: Path) -> AbstractContextManager[Callable[[], None]]:
    return nullcontext(lambda: None) if folder == DEMO_FOLDER else trying(folder)


@contextmanager
def threads_for(folder: Path) -> Iterator[None]:
    """One thread while the block runs, if the model in `folder` is small, else no more than there are processors to
    use; as many as there were after.

    A small model's matrices are too small to share out, and on a busy machine threads that wait for one another made
    such runs ten times slower.
    """
    with threads(1 if _small(folder) else min(torch.get_num_threads(), processors())):
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads of torch's while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def running(model: PreTrainedModel) -> Iterator[None]:
    """InputError, in one line, for what untrusted numbers break while the block runs the model."""
    try:
        yield
    except (InputError, Refused, MemoryError):
        raise
    except Exception as error:
        where = getattr(model, "name_or_path", "") or type(model).__name__
        raise InputError(f"{where}: transformers cannot run it ({own_words(error)})") from error


def meta_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the model of `folder` without its weights: parameters on the meta device, buffers real. No weights are
    read.
    """
    auto = auto_class(read_config(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted())
        with threads(1), memory_limited(BUFFER_BYTES), _without_weights():  # threads map memory
            model = auto.from_config(config, dtype=dtype, experts_implementation="eager", trust_remote_code=trusted())
    except Exception as error:  # untrusted numbers can break a constructor in any way
        reason = own_words(error)
        raise InputError(f"{folder}: config.json describes no model that transformers can build ({reason})") from error
    if not hasattr(model.config.get_text_config(), "hidden_size"):
        raise InputError(f"{folder}: {type(model.config).__name__} names no text model with a hidden_size")
    model.tie_weights()
    return model.eval()


def image_token_of(config: PretrainedConfig) -> int:
    """Returns the word that stands for an image feature; -1 if the config names none."""
    return next((value for name in IMAGE_TOKENS if isinstance(value := getattr(config, name, None), int)), -1)


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters of modules that are made while the block runs are on the meta device, and transformers does not draw
    numbers for them, which takes longer there than all else; buffers are real.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        register = nn.Module.register_parameter

        def register_drawn(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            if parameter is not None:
                module._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

        nn.Module.register_parameter = register_drawn  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
