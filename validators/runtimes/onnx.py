"""An exported folder in onnxruntime: pictures and text in, logits and tokens out, the cache kept on its device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, GenerationConfig, PreTrainedModel

from ...export.formats.onnx.layout import (
    DECODER,
    EMBED,
    FOLDER,
    GRAPHS,
    PRECISIONS,
    PROVIDERS,
    VISION,
    Precision,
    graph_file,
)
from ...export.formats.onnx.names import DEEPSTACK
from ...export.formats.onnx.paths import path_of
from ...guard.base.errors import InputError, first_line
from ...guard.model.vlm import VLM, load_processor, meta_model

PAST, PRESENT = "past_key_values", "present"


def onnxruntime() -> Any:
    """Returns the package, told to report nothing of what it runs; InputError where it is missing."""
    try:
        package: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise InputError("running ONNX graphs needs onnxruntime; pip install 'guardfold[cpu]' (or gpu)") from error
    package.disable_telemetry_events()
    return package


def device_for(provider: str) -> str:
    """cpu or cuda, as onnxruntime names devices. InputError for cuda where onnxruntime has none, or another name."""
    if provider not in PROVIDERS:
        raise InputError(f"--provider {provider}: one of {', '.join(PROVIDERS)}")
    has_cuda = "CUDAExecutionProvider" in onnxruntime().get_available_providers()
    if provider == "cuda" and not has_cuda:
        raise InputError("--provider cuda: this onnxruntime has no CUDA; pip install 'guardfold[gpu]'")
    return "cuda" if has_cuda and provider != "cpu" else "cpu"


def graphs_in(folder: Path) -> dict[Precision, Path]:
    """Returns the number formats in which `folder` holds all three graphs, and where they lie."""
    return {
        precision: place
        for place in (folder / FOLDER, folder)
        for precision in PRECISIONS.values()
        if all((place / graph_file(graph, precision)).is_file() for graph in GRAPHS)
    }


@dataclass
class State:
    """A batch under way: its cache (on the device), mask [batch, positions so far], and the positions that come next.

    following: [batch, 1] or [rows, batch, 1], the position_ids of the next token.
    """

    cache: Mapping[str, Any]
    mask: Tensor
    following: Tensor


def _ends(folder: Path, model: PreTrainedModel) -> tuple[list[int], int]:
    """Returns (tokens that end an answer, the token that fills what is after)."""
    saved = (folder / "generation_config.json").is_file()
    try:
        config = GenerationConfig.from_pretrained(folder) if saved else model.generation_config
    except Exception as error:  # untrusted numbers can break it in any way
        raise InputError(
            f"{folder / 'generation_config.json'}: transformers does not take it ({first_line(error)})"
        ) from error
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return ends, config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)


class Runner:
    """The three graphs of `folder` in one number format, as onnxruntime sessions.

    profile: a path prefix; onnxruntime then notes which node ran where (end it with `end_profile`).  model: the
    folder's, without weights, where it is built already.
    Raises InputError if the graphs are missing, cannot be loaded, or do not run on the provider.
    """

    def __init__(
        self,
        folder: Path,
        precision: Precision,
        provider: str = "auto",
        profile: Path | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        places, runtime = graphs_in(folder), onnxruntime()
        if precision not in places:
            raise InputError(f"{folder}: no {precision.name} graphs; export them with --format onnx")
        self.folder, self.precision, self.device = folder, precision, device_for(provider)
        if precision.provider not in (None, self.device):
            raise InputError(f"{precision.name} graphs run on {precision.provider} alone; choose another --onnx-dtype")
        self.model = model or meta_model(folder)
        self.path = path_of(self.model)
        self.ends, self.pad = _ends(folder, self.model)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        providers = (
            ["CPUExecutionProvider"] if self.device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        self.sessions = {}
        for graph in GRAPHS:
            file = places[precision] / graph_file(graph, precision)
            try:
                self.sessions[graph] = runtime.InferenceSession(file, options, providers=providers)
            except Exception as error:  # a foreign graph can fail in any way
                raise InputError(f"{file}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from error
        self._value = runtime.OrtValue

    def prefill(self, batch: BatchFeature, *edges: int) -> tuple[Tensor, State]:
        """Returns (logits [batch, positions, vocabulary], state) of a left-padded batch, computed in pieces that end at
        `edges`, so that all but the first have a past; in one piece by default.
        """
        mask = batch["attention_mask"]
        (embeds, deep), (where, following) = self._embedded(batch), self.path.positions(batch)
        cache, pieces = self._empty(len(mask)), []
        for first, last in pairwise((0, *edges, mask.shape[1])):
            now = slice(first, last)
            logits, cache = self._decode(embeds[:, now], deep[:, :, now], mask[:, :last], where[..., now], cache)
            pieces.append(logits)
        return torch.cat(pieces, dim=1), State(cache, mask, following)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns (logits [batch, vocabulary], state) after one more token for every row; tokens: [batch]."""
        embeds, deep = self._embedded(BatchFeature({"input_ids": tokens[:, None]}))
        mask = torch.cat([state.mask, torch.ones_like(state.mask[:, :1])], dim=1)
        logits, cache = self._decode(embeds, deep, mask, state.following, state.cache)
        return logits[:, -1], State(cache, mask, state.following + 1)

    def tokens(self, batch: BatchFeature, count: int, never: Sequence[int] = ()) -> Iterator[Tensor]:
        """Up to `count` most likely tokens, [batch] each, none of them one of `never`."""
        logits, state = self.prefill(batch)
        last = logits[:, -1]
        for left in reversed(range(count)):
            last[:, list(never)] = -torch.inf
            chosen = last.argmax(-1)
            yield chosen
            if left:
                last, state = self.step(chosen, state)

    @property
    def vlm(self) -> VLM:
        """What runs here as other parts know a model: `generate` is ours, everything else has no weights."""
        self.model.generate = self._generate  # type: ignore[assignment]
        return VLM(self.model, load_processor(self.folder), self.folder)

    @torch.inference_mode()
    def _generate(self, max_new_tokens: int, streamer: Any = None, do_sample: bool = False, **batch: Tensor) -> Tensor:
        """Returns [batch, prompt and new tokens], greedy; rows that have ended are padded."""
        assert not do_sample
        ids = batch["input_ids"]
        made, ended = [ids], torch.zeros(len(ids), dtype=torch.bool)
        if streamer:
            streamer.put(ids)
        for chosen in self.tokens(BatchFeature(batch), max_new_tokens):
            chosen = chosen.masked_fill(ended, self.pad)
            made.append(chosen[:, None])
            if streamer:
                streamer.put(chosen)
            ended |= torch.isin(chosen, torch.tensor(self.ends))
            if ended.all():
                break
        if streamer:
            streamer.end()
        return torch.cat(made, dim=1)

    def end_profile(self) -> Path:
        """Where onnxruntime wrote down which node of the decoder ran where, and how long."""
        return Path(self.sessions[DECODER].end_profiling())

    def _embedded(self, batch: BatchFeature) -> tuple[Tensor, Tensor]:
        """inputs_embeds [batch, positions, d] with the pictures in their places, and what the decoder's first layers
        get of them, [levels, batch, positions, d]."""
        (embeds,) = self._run(EMBED, {"input_ids": batch["input_ids"]})
        deep = embeds.new_zeros(self.path.levels, *embeds.shape)
        if "pixel_values" not in batch:
            return embeds, deep
        names = self.path.outputs
        results = [dict(zip(names, self._run(VISION, call), strict=True)) for call in self.path.calls(batch)]
        place = batch["input_ids"] == self.model.config.image_token_id
        features = self.path.tokens(results, batch)
        if int(place.sum()) != len(features):
            raise InputError(f"the prompt has {int(place.sum())} image tokens, its pictures make {len(features)}")
        embeds[place] = features
        if self.path.levels:
            deep[:, place] = torch.cat([result[DEEPSTACK] for result in results], dim=1)
        return embeds, deep

    def _empty(self, count: int) -> dict[str, Any]:
        """Returns a cache of no positions for `count` rows."""
        cache = {}
        for get_input in self.sessions[DECODER].get_inputs():
            if get_input.name.startswith(PAST):
                _, heads, _, size = get_input.shape
                cache[get_input.name] = self._value.ortvalue_from_shape_and_type(
                    (count, heads, 0, size), ELEMENT_TYPES[get_input.type], self.device
                )
        return cache

    def _decode(
        self, embeds: Tensor, deep: Tensor, mask: Tensor, where: Tensor, cache: Mapping[str, Any]
    ) -> tuple[Tensor, Any]:
        session = self.sessions[DECODER]
        binding = session.io_binding()
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": where}
        for name, tensor in (inputs | ({DEEPSTACK: deep} if self.path.levels else {})).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(tensor.numpy()))
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        names = [get_output.name for get_output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        following = {name.replace(PRESENT, PAST, 1): tensor for name, tensor in zip(names[1:], present, strict=True)}
        return torch.from_numpy(logits.numpy()), following

    def _run(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = self.sessions[graph].run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return [torch.from_numpy(entry) for entry in found]


ELEMENT_TYPES: dict[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": 16}
"""A cache's type as a session names it -> as onnxruntime makes values of it (16 is the protocol's bfloat16)."""
