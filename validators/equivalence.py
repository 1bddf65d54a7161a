"""Is the folded checkpoint equal to the original with the guard's hooks? Logits, greedy tokens, and the leak detector.

Everything runs in float32 straight from the files (streaming.py). A float16 or bfloat16 checkpoint cannot equal its
hooks better than its dtype rounds, so there two things are shown: the fold before rounding is equal to 1e-5, and the
file is as far off as rounding noise of half a unit in the last place of the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from ..export.checkpoint import DTYPES, Checkpoint
from ..export.fold import Edit, Fold
from ..guard.guard import Guard
from ..guard.hooks import attached
from ..guard.progress import track
from ..guard.states import forward
from .batches import comparison_batches
from .leaks import activation_tolerance, leak_probe, tensor_leaks, tensor_tolerance
from .streaming import streamed

TOLERANCE = 1e-5
"""Largest |logit difference| / scale of the logits that float32 arithmetic explains."""

ROUNDING_FACTOR = 8.0
"""A rounded file may be this many times as far from its hooks as one sample of rounding noise is from no noise."""

GREEDY_TOKENS = 32
GENERATE_BELOW_BYTES = 256 * 2**20
"""Checkpoints up to this size also generate; above it, 32 passes over the file would take too long, and the argmax at
every prompt position is compared instead."""


@dataclass(frozen=True)
class Equivalence:
    """Differences are max |a - b| over all positions and batches, relative to the original's largest |logit|.

    edit: hooked vs original, what the guard changes.  folded: file vs hooked.  exact: the fold before rounding vs
    hooked (equal to `folded` for float32 files).  noise: one sample of rounding noise; None for float32.  argmax: share of
    positions whose most likely token agrees.  greedy: share of generated tokens that agree, None where not generated.
    """

    scale: float
    edit: float
    folded: float
    exact: float
    noise: float | None
    argmax: float
    greedy: float | None
    greedy_tokens: int
    activation_leak: float | None
    activation_tolerance: float
    worst_activation: str | None
    tensor_leak: float
    worst_tensor: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class _RoundingNoise:
    """Adds uniform noise of up to half a unit in the last place of `dtype`: what rounding does, at random."""

    two_pass = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.eps = torch.finfo(dtype).eps
        self.draw = torch.Generator().manual_seed(0)

    def observe(self, block: Tensor, first: int) -> None:
        """Nothing: noise does not depend on other rows."""

    def apply(self, block: Tensor, first: int) -> Tensor:
        ulp = torch.exp2(block.abs().clamp(min=torch.finfo(block.dtype).tiny).log2().floor()) * self.eps
        return block + ulp * (torch.rand(block.shape, generator=self.draw) - 0.5)


def _logits(model: PreTrainedModel, batches: Mapping[str, BatchFeature]) -> Tensor:
    """[all real positions of all batches, vocabulary], float32."""
    rows = []
    for batch in batches.values():
        logits = forward(model, batch, use_cache=False).logits.float()
        rows.append(logits[batch["attention_mask"].bool()])
    return torch.cat(rows)


def _greedy(model: PreTrainedModel, batches: Mapping[str, BatchFeature]) -> list[Tensor]:
    return [
        model.generate(**batch, do_sample=False, min_new_tokens=GREEDY_TOKENS, max_new_tokens=GREEDY_TOKENS)[
            :, batch["input_ids"].shape[1] :
        ]
        for batch in batches.values()
    ]


@torch.inference_mode()
def compare(source: Checkpoint, folded: Checkpoint, guard: Guard, fold: Fold) -> Equivalence:
    """`folded` against `source` with `guard` attached. `fold` says which tensors were edited and how.

    Raises InputError if either checkpoint does not load.
    """
    dtypes = [source.info(name).dtype for name in fold.edits]
    rounded = any(dtype in ("F16", "BF16") for dtype in dtypes)
    generate = source.data_bytes <= GENERATE_BELOW_BYTES

    def run(
        checkpoint: Checkpoint, edits: Mapping[str, Sequence[Edit]] | None = None, hooks: Guard | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        with streamed(checkpoint, edits) as model, attached(model, hooks) if hooks else nullcontext():
            return _logits(model, batches), _greedy(model, batches) if generate else []

    with streamed(source) as model:
        batches = comparison_batches(model, source.folder)
    steps = iter(track(range(5 if rounded else 3), "equivalence"))
    next(steps)
    original, _ = run(source)
    next(steps)
    hooked, hooked_tokens = run(source, hooks=guard)
    next(steps)
    with streamed(folded) as model, leak_probe(model, guard) as leaks:
        got, got_tokens = _logits(model, batches), _greedy(model, batches) if generate else []

    scale = float(original.abs().max())

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) / scale

    exact, noise = distance(got, hooked), None
    if rounded:
        next(steps)
        exact_logits, _ = run(source, fold.edits)
        next(steps)
        noisy = {name: [*edits, _RoundingNoise(DTYPES[source.info(name).dtype])] for name, edits in fold.edits.items()}
        exact, noise = distance(exact_logits, hooked), distance(run(source, noisy)[0], exact_logits)
    next(steps, None)
    per_tensor = tensor_leaks(source, folded, fold.edits)
    worst_tensor = max(per_tensor, key=lambda name: per_tensor[name] / tensor_tolerance(source.info(name).dtype))
    pairs = list(zip(got_tokens, hooked_tokens, strict=True))
    equal = sum(int((a == b).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    result = Equivalence(
        scale=scale,
        edit=distance(hooked, original),
        folded=distance(got, hooked),
        exact=exact,
        noise=noise,
        argmax=float((got.argmax(-1) == hooked.argmax(-1)).double().mean()),
        greedy=equal / total if total else None,
        greedy_tokens=total,
        activation_leak=leaks.worst if leaks.at else None,
        activation_tolerance=activation_tolerance(dtypes),
        worst_activation=max(leaks.at, key=lambda place: leaks.at[place]) if leaks.at else None,
        tensor_leak=per_tensor[worst_tensor],
        worst_tensor=worst_tensor,
        failures=(),
    )
    limit = tensor_tolerance(source.info(worst_tensor).dtype)
    return replace(result, failures=tuple(_failures(result, limit)))


def _failures(result: Equivalence, tensor_limit: float) -> list[str]:
    """What is not as it must be, a line each; empty when the fold equals its hooks."""
    failures = []
    if not result.exact <= TOLERANCE:
        failures.append(f"fold and hooks differ by {result.exact:.1e} of the logits' scale (limit {TOLERANCE:.0e})")
    if result.noise is None:
        if result.greedy is not None and result.greedy < 1:
            failures.append(f"only {result.greedy:.1%} of {result.greedy_tokens} greedy tokens equal the hooks'")
    elif not result.folded <= ROUNDING_FACTOR * result.noise + TOLERANCE:
        failures.append(f"the file is {result.folded:.1e} from its hooks, rounding explains {result.noise:.1e}")
    if result.activation_leak is not None and not result.activation_leak <= result.activation_tolerance:
        failures.append(
            f"{result.worst_activation} still carries {result.activation_leak:.1e} of its size along the direction "
            f"(limit {result.activation_tolerance:.0e})"
        )
    if not result.tensor_leak <= tensor_limit:
        failures.append(
            f"{result.worst_tensor} keeps {result.tensor_leak:.1e} of the direction (limit {tensor_limit:.0e})"
        )
    return failures
