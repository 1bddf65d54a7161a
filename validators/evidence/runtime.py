"""Do the graphs compute what torch computes? onnxruntime against the guarded weights, and against the hooked original.

Prefill logits, GREEDY_TOKENS tokens with the key-value cache, one row and several left-padded ones, several pictures, a
prefill in two pieces (so that many tokens meet a past), and how fast both run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from ...export.formats.onnx.graphs import Plan
from ...export.formats.onnx.layout import PRECISIONS, Precision
from ...export.formats.onnx.paths import PATHS
from ...guard.base.errors import InputError
from ...guard.base.progress import track
from ...guard.fitting.states import forward
from ...guard.guard import Guard
from ...guard.hooks import attached
from ...guard.model.greedy import most_likely
from ...guard.model.trial import Exhausting
from ...guard.model.vlm import VLM, load_model, load_processor, meta_model
from ...guard.prompts.image_kinds import COMPARED_KINDS
from ...guard.prompts.prompts import Prompt, encode, illustrated
from ..behaviour.verdict import Verdict
from ..runtimes.onnx import Runner
from .batches import GREEDY_TOKENS, TEXTS, Batches, comparison_batches


@dataclass(frozen=True)
class Observed:
    """What torch says of one `batch`. logits: [real tokens, vocabulary].  tokens: [batch,
    GREEDY_TOKENS], the most likely ones, `ends` (ends of text) never among them.  steps: [GREEDY_TOKENS, batch,
    vocabulary], the logits each token was chosen from.  seconds: for all tokens, prefill included.
    """

    batch: BatchFeature
    logits: Tensor
    tokens: Tensor
    steps: Tensor
    ends: list[int]
    seconds: float


Reference = Mapping[str, Observed]


@dataclass(frozen=True)
class Agreement:
    """One number format. Differences are max |a - b| relative to `scale`, torch's largest |logit|.

    prefill, decode: onnxruntime vs torch, at prompt positions and at generated ones (past > 0).  pieces: a prefill in
    two pieces vs in one; None where prompts see all of themselves.  hooked: onnxruntime vs the original with hooks,
    prompt positions; None where not compared.  greedy: share of tokens equal to torch's.  speed: tokens a second, this
    and torch's, on the same batches.
    """

    precision: str
    device: str
    scale: float
    prefill: float
    decode: float
    pieces: float | None
    hooked: float | None
    greedy: float
    greedy_tokens: int
    speed: tuple[float, float]
    verdict: Verdict | None = None
    """How these graphs themselves behave, where they are too coarse to be called equal."""
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runtime:
    """All formats of one folder."""

    formats: tuple[Agreement, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(f"{form.precision}: {failure}" for form in self.formats for failure in form.failures)

    @property
    def passed(self) -> bool:
        return not self.failures

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    @property
    def vouched(self) -> bool:
        """Whether every format is equal to torch, or was itself shown to be safer."""
        return self.passed and all(
            form.verdict is not None or not math.isinf(PRECISIONS[form.precision].tolerance) for form in self.formats
        )


def comparison(model: PreTrainedModel, folder: Path) -> Batches:
    """Returns the comparison's own batches, and, with a processor, left-padded prompts with a different picture
    each.
    """
    batches = dict(comparison_batches(model, folder))
    with suppress(InputError):
        vlm = VLM(model, load_processor(folder), folder)
        kinds = zip(cycle(TEXTS), COMPARED_KINDS, strict=False)
        batches["images"] = encode(vlm, [illustrated([Prompt(text)], kind)[0] for text, kind in kinds])
    return {name: as_prompts(model, batch) for name, batch in batches.items()}


def as_prompts(model: PreTrainedModel, batch: BatchFeature) -> BatchFeature:
    """Returns `batch` with what tells a model that lets prompts see all of themselves that these are prompts."""
    if not PATHS[model.config.model_type].prefix:
        return batch
    return BatchFeature({**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])})


@torch.inference_mode()
def observe_in_torch(model: Any, batches: Batches, guard: Guard | None = None) -> Reference:
    """Returns what `model` says in torch, with `guard`'s hooks if there is one."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    more = {"min_new_tokens": GREEDY_TOKENS, "output_logits": True, "return_dict_in_generate": True}
    found = {}
    with attached(model, guard) if guard else nullcontext():
        for name, batch in batches.items():
            logits = forward(model, batch, use_cache=False).logits.float()[batch["attention_mask"].bool()]
            start = time.perf_counter()
            made = most_likely(model, batch, GREEDY_TOKENS, **more)
            seconds = time.perf_counter() - start
            tokens = made.sequences[:, batch["input_ids"].shape[1] :]
            steps = torch.stack(made.logits).float()
            found[name] = Observed(batch, logits, tokens, steps, ends, seconds)
    return found


@torch.inference_mode()
def agreement(runner: Runner, batches: Batches, reference: Reference, hooked: Reference | None = None) -> Agreement:
    """Returns what `runner` says of `batches`, against `reference` and, at prompt positions, against `hooked`.

    Raises InputError if the batches are not those that torch saw.
    """
    scale = max(float(observed.logits.abs().max()) for observed in reference.values())
    prefill, decode, pieces, hooks, equal, seconds = [], [], [], [], [], 0.0
    for name, batch in batches.items():
        observed = reference[name]
        if not torch.equal(batch["input_ids"], observed.batch["input_ids"]):
            raise InputError(f"{runner.folder}: its processor makes other tokens of a prompt than the model's own")
        real = batch["attention_mask"].bool()
        logits, state = runner.prefill(batch)
        prefill.append(_distance(logits[real], observed.logits))
        if not runner.path.prefix:
            pieces.append(_distance(runner.prefill(batch, real.shape[1] // 2)[0][real], logits[real]))
        if hooked:
            hooks.append(_distance(logits[real], hooked[name].logits))
        last = logits[:, -1]
        for token, expected in zip(observed.tokens.T, observed.steps, strict=True):
            decode.append(_distance(last, expected))
            equal.append(_chosen(last, observed.ends) == token)
            last, state = runner.step(token, state)
        start = time.perf_counter()
        list(runner.tokens(batch, GREEDY_TOKENS, observed.ends))
        seconds += time.perf_counter() - start
    count = sum(len(rows) for rows in equal)
    agree = Agreement(
        precision=runner.precision.name,
        device=runner.device,
        scale=scale,
        prefill=_largest(prefill) / scale,
        decode=_largest(decode) / scale,
        pieces=_largest(pieces) / scale if pieces else None,
        hooked=_largest(hooks) / scale if hooked else None,
        greedy=int(torch.cat(equal).sum()) / count,
        greedy_tokens=count,
        speed=(count / seconds, count / sum(observed.seconds for observed in reference.values())),
    )
    return replace(agree, failures=tuple(_failures(agree, runner.precision)))


def _failures(found: Agreement, precision: Precision) -> list[str]:
    failures = [
        f"{what} logits differ from torch by {value:.1e} of their scale (limit {precision.tolerance:.0e})"
        for what, value in (("prefill", found.prefill), ("decode", found.decode), ("split prefill", found.pieces))
        if value is not None and not value <= precision.tolerance
    ]
    if precision.exact and found.greedy < 1:
        failures.append(f"only {found.greedy:.1%} of {found.greedy_tokens} greedy tokens equal torch's")
    return failures


def check_graphs(
    folder: Path, plan: Plan, weights: Path, original: Path | None, guard: Guard, provider: str
) -> Runtime:
    """Returns the graphs that `plan` wrote into `folder`, against the model in `weights`, in torch and in float32.

    original: the folder that `guard` was folded for, to be compared with hooks as well.  Where the guard is traced,
    `weights` are the original's, and torch gets the hooks.  Raises InputError if a graph does not load or run.
    """
    rounded = {
        stored: _reference(weights, plan.traced, stored)
        for stored in dict.fromkeys(precision.stored for precision in plan.precisions)
    }
    hooked = _reference(original, guard) if original and not plan.traced else None
    model, found = meta_model(folder), []
    for precision in track(plan.precisions, "onnxruntime"):
        runner = Runner(folder, precision, provider, model=model)
        reference = rounded[precision.stored]
        found.append(agreement(runner, _again(model, folder, reference), reference, hooked))
    return Runtime(tuple(found))


def _again(model: PreTrainedModel, folder: Path, reference: Reference) -> Batches:
    """Returns what `reference` was asked, as the processor in `folder` makes it; without a processor, as it was."""
    try:
        load_processor(folder)
    except Exhausting:
        raise
    except InputError:
        return {name: observed.batch for name, observed in reference.items()}
    return comparison(model, folder)


def _reference(folder: Path, guard: Guard | None, stored: torch.dtype = torch.float32) -> Reference:
    """Returns what the model in `folder`, its weights rounded to `stored`, says in torch, computing in float32."""
    model = load_model(folder, "cpu", torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).float()
    return observe_in_torch(model, comparison(model, folder), guard)


def _chosen(logits: Tensor, ends: Sequence[int]) -> Tensor:
    return logits.index_fill(-1, torch.tensor(ends, dtype=torch.long), -torch.inf).argmax(-1)


def _largest(values: Sequence[float]) -> float:
    """Their maximum, or nan if one of them is: Python's own max would pass over it."""
    return float(torch.tensor(values).max())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
