"""Is the folded checkpoint equal to the original with the guard's hooks? Logits, greedy tokens, and the leak detector.

Everything runs in float32 straight from the files (streaming.py). A float16 or bfloat16 checkpoint cannot equal its
hooks better than its dtype rounds, so there two things are shown: the fold before rounding is equal to 1e-5, and every
entry in the file is that fold's to the last place (written.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.text import Text
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel

from ...export.checkpoint.headers import DTYPES, Checkpoint
from ...export.checkpoint.rounding import Rounding
from ...export.fold import Fold
from ...export.formats.lora import Adapted
from ...guard.base.errors import InputError
from ...guard.base.progress import bar
from ...guard.fitting.states import forward
from ...guard.guard import Guard
from ...guard.hooks import attached
from ...guard.model.greedy import most_likely
from ..runtimes.adapted import running_adapted
from ..runtimes.streamed import streamed
from .batches import GREEDY_TOKENS, Batches, comparison_batches
from .leaks import activation_tolerance, leak_probe, tensor_leaks, tensor_tolerance
from .piece import JSON, Context, Found, Piece, line
from .written import PLACES, places_off

Logits = dict[str, Tensor]

TOLERANCE = 1e-5
"""Largest |logit difference| / scale of the logits that float32 arithmetic explains in a model that does not magnify
it; in one that does, float64 decides.
"""

APPROXIMATE_LIMIT = 0.5
"""A fold that no weights can make exact may be this far from its hooks, relative to what the hooks change."""

NEVER_SAID = 1e30
"""Logits beyond this are words that a model forbids with its dtype's least number; they are not compared."""

POSITIONS = 64
"""Positions compared in each row: an image prompt has hundreds, and each has a logit for every word."""

GENERATE_BELOW_BYTES = 256 * 2**20
"""Checkpoints up to this size also generate; above it, 32 passes over the file would take too long, and the argmax at
every prompt position is compared instead."""


@dataclass(frozen=True)
class Equivalence:
    """Differences are max |a - b| over all positions and batches, relative to the original's largest |logit|.

    compared: the kinds of prompts that were run.  arithmetic: what it was computed in.  approximate: why no weights
    equal the hooks (Fold.approximate); None where they do.  edit: hooked vs original, what the guard changes.  folded:
    file vs hooked, or vs the fold before rounding if it is approximate.  exact: the fold before rounding vs hooked
    (equal to `folded` for float32 files).  places: how far an entry of an edited tensor is from the fold before
    rounding, in units in the last place; the worst one.  argmax: share of
    positions whose most likely token agrees.  greedy: share of generated tokens that agree, if any were.
    rounding: as it was asked for.
    """

    compared: tuple[str, ...]
    arithmetic: str
    approximate: str | None
    scale: float
    edit: float
    folded: float
    exact: float
    places: float
    misplaced: str | None
    argmax: float
    greedy: float | None
    greedy_tokens: int
    activation_leak: float | None
    activation_tolerance: float
    worst_activation: str | None
    tensor_leak: float | None
    tensor_tolerance: float | None
    worst_tensor: str | None
    rounding: Rounding
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def figures(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def _logits(model: PreTrainedModel, batches: Batches) -> Logits:
    """Returns batch -> [compared positions, vocabulary], float32: POSITIONS of each row, evenly spaced up to
    its last.
    """
    compared = {}
    for name, batch in batches.items():
        mask = batch["attention_mask"].bool()
        kept = torch.linspace(0, mask.shape[1] - 1, min(POSITIONS, mask.shape[1])).round().long()
        logits = forward(model, batch, use_cache=False, logits_to_keep=kept).logits
        kept_logits = logits[mask[:, kept]]
        compared[name] = kept_logits.where(kept_logits.abs() < NEVER_SAID, 0)
    return compared


def _greedy(model: PreTrainedModel, batches: Batches) -> list[int]:
    """GREEDY_TOKENS most likely tokens after every prompt, with a KV cache, one list for all."""
    return [
        token
        for batch in batches.values()
        for row in most_likely(model, batch, GREEDY_TOKENS, min_new_tokens=GREEDY_TOKENS)
        for token in row[batch["input_ids"].shape[1] :].tolist()
    ]


def _agreement(a: Sequence[Any], b: Sequence[Any]) -> float | None:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a) if a else None


def compare(
    source: Checkpoint, folded: Checkpoint | Adapted, guard: Guard, fold: Fold, rounding: Rounding = "repair"
) -> Equivalence:
    """Returns `folded` against `source` with `guard` attached. `fold` says which tensors were edited and how.

    rounding: how they were rounded, which decides how much of a direction may be left in them.

    Raises InputError if either checkpoint does not load.
    """
    found = _compare(source, folded, guard, fold, rounding, torch.float32)
    if found.approximate or found.exact <= TOLERANCE:
        return found
    return _compare(source, folded, guard, fold, rounding, torch.float64)


@torch.inference_mode()
def _compare(
    source: Checkpoint, folded: Checkpoint | Adapted, guard: Guard, fold: Fold, rounding: Rounding, dtype: torch.dtype
) -> Equivalence:
    dtypes = {name: folded.info(name).dtype for name in fold.edits}
    rounded = any(DTYPES[dtype_name].itemsize < dtype.itemsize for dtype_name in dtypes.values())
    with bar() as progress:
        task = progress.add_task("equivalence", total=4 if rounded else 3)
        with streamed(source, dtype=dtype) as model:
            batches = {name: _in(dtype, batch) for name, batch in comparison_batches(model, source.folder).items()}
            if not batches:
                raise InputError(f"{source.folder}: no prompt to compare with; add the model's processor to the folder")
            generated = batches if source.data_bytes <= GENERATE_BELOW_BYTES else {}
            original = _logits(model, batches)
            progress.advance(task)
            with attached(model, guard):
                hooked, hooked_tokens = _logits(model, batches), _greedy(model, generated)
        progress.advance(task)
        with _running(folded, dtype) as model, leak_probe(model, guard) as leaks:
            got, tokens = _logits(model, batches), _greedy(model, generated)
        progress.advance(task)
        exact_logits = got
        scale = max(float(logits.abs().max()) for logits in original.values())
        if not 0 < scale < math.inf:
            raise InputError(f"{source.folder}: its logits are zero or not finite; weights or config are damaged")
        if rounded or fold.left_out:
            with streamed(source, fold, folded if isinstance(folded, Checkpoint) else source, dtype) as model:
                exact_logits = _logits(model, batches)
            progress.advance(task)
    off = {} if isinstance(folded, Adapted) else places_off(source, folded, fold)
    misplaced = max(off, key=lambda name: off[name], default=None)
    per_tensor = tensor_leaks(source, folded, fold.edits)
    limits = {name: tensor_tolerance(folded.info(name), fold.edits[name], rounding) for name in per_tensor}
    worst_tensor = max(per_tensor, key=lambda name: per_tensor[name] / limits[name], default=None)
    choices = [torch.cat([logit.argmax(-1) for logit in logits.values()]).tolist() for logits in (got, hooked)]
    result = Equivalence(
        compared=tuple(batches),
        arithmetic=str(dtype).removeprefix("torch."),
        approximate=fold.approximate,
        scale=scale,
        edit=_distance(hooked, original, scale),
        folded=_distance(got, exact_logits if fold.approximate else hooked, scale),
        exact=_distance(exact_logits, hooked, scale),
        places=off[misplaced] if misplaced else 0.0,
        misplaced=misplaced,
        argmax=_agreement(*choices) or 0.0,
        greedy=_agreement(tokens, hooked_tokens),
        greedy_tokens=len(tokens),
        activation_leak=leaks.worst if leaks.at and not fold.left_out else None,
        activation_tolerance=activation_tolerance(list(dtypes.values())),
        worst_activation=max(leaks.at, key=lambda place: leaks.at[place]) if leaks.at else None,
        tensor_leak=per_tensor[worst_tensor] if worst_tensor else None,
        tensor_tolerance=limits[worst_tensor] if worst_tensor else None,
        worst_tensor=worst_tensor,
        rounding=rounding,
        failures=(),
    )
    return replace(result, failures=tuple(_failures(result, fold)))


def _running(folded: Checkpoint | Adapted, dtype: torch.dtype) -> AbstractContextManager[PreTrainedModel]:
    return running_adapted(folded, dtype) if isinstance(folded, Adapted) else streamed(folded, dtype=dtype)


def _in(dtype: torch.dtype, batch: BatchFeature) -> BatchFeature:
    floats = {name: tensor.to(dtype) for name, tensor in batch.items() if _floats(tensor)}
    return BatchFeature({**batch, **floats})


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _distance(a: Logits, b: Logits, scale: float) -> float:
    """max |a - b| / scale over the batches of `a`."""
    return max(float((logits - b[name]).abs().max()) for name, logits in a.items()) / scale


def _failures(result: Equivalence, fold: Fold) -> list[str]:
    """Returns what is not as it must be, a line each; empty when the fold equals its hooks, or, where it holds a part
    of the guard, that part of the fold.
    """
    failures = []
    if fold.left_out:
        if not result.folded <= TOLERANCE:
            failures.append(f"the adapter and what it holds of the guard differ by {result.folded:.1e}")
    elif result.approximate:
        if not result.exact <= APPROXIMATE_LIMIT * result.edit:
            failures.append(
                f"an approximate fold, {result.exact:.1e} from its hooks, which change {result.edit:.1e}: not close "
                f"(limit {APPROXIMATE_LIMIT:.0%} of that)"
            )
    elif not result.exact <= TOLERANCE:
        failures.append(f"fold and hooks differ by {result.exact:.1e} of the logits' scale (limit {TOLERANCE:.0e})")
    elif result.folded <= TOLERANCE and result.greedy is not None and result.greedy < 1:
        failures.append(f"only {result.greedy:.1%} of {result.greedy_tokens} greedy tokens equal the hooks'")
    if not result.places <= PLACES:
        failures.append(
            f"{result.misplaced} is {result.places:.1e} units in the last place from the fold (limit {PLACES})"
        )
    if result.activation_leak is not None and not result.activation_leak <= result.activation_tolerance:
        failures.append(
            f"{result.worst_activation} still carries {result.activation_leak:.1e} of its size along the direction "
            f"(limit {result.activation_tolerance:.0e})"
        )
    if result.tensor_leak is not None and not result.tensor_leak <= (result.tensor_tolerance or 0):
        limit = f"limit {result.tensor_tolerance:.0e}"
        failures.append(f"{result.worst_tensor} keeps {result.tensor_leak:.1e} of the direction ({limit})")
    return failures


def equality(equal: JSON) -> str:
    """Equivalence.figures() in a sentence."""
    if equal["approximate"]:
        return (
            f"APPROXIMATE: {equal['approximate']}. Folded weights against the original with hooks: largest logit "
            f"difference {equal['exact']:.1e} of the logits' scale, where the guard itself changes {equal['edit']:.1e}."
        )
    return (
        f"Folded weights against the original with hooks: largest logit difference {equal['folded']:.1e} of the "
        f"logits' scale, where the guard itself changes {equal['edit']:.1e}."
    )


def _run(context: Context) -> Equivalence | None:
    if edited := context.edited:
        return compare(context.source, edited.weights, context.guard, edited.fold, edited.rounding)
    return None


def _summary(equal: Equivalence) -> str:
    rounded = "" if equal.exact == equal.folded else f" (before rounding, {equal.rounding}: {equal.exact:.1e})"
    greedy = "" if equal.greedy is None else f", {equal.greedy:.1%} of {equal.greedy_tokens} greedy tokens equal"
    leaks = [leak for leak in (equal.tensor_leak, equal.activation_leak) if leak is not None]
    leak = f"; leak {max(leaks):.1e}" if leaks else ""
    return f"fold vs hooks {equal.folded:.1e} of the logits' scale{rounded}{greedy}{leak}"


def _warnings(found: Found) -> Iterator[Text]:
    equal = found.of(EQUIVALENCE)
    if equal and "image" not in equal.compared:
        yield line("equivalence", "no picture was run: the folder has no processor", style="yellow")
    if equal and equal.approximate:
        away = f"fold vs hooks {equal.exact:.1e} where the hooks change {equal.edit:.1e}: {equal.approximate}"
        yield line("approximate", away, style="yellow")


def _sentence(figures: JSON) -> Iterator[str]:
    if equal := figures.get("equivalence"):
        yield equality(equal)


_ROUNDING = {
    "repair": "with repair (a few entries by one step more, so that the projection survives the dtype)",
    "nearest": "to nearest",
}


def _paragraphs(figures: JSON) -> Iterator[str]:
    yield from _sentence(figures)
    equal = figures.get("equivalence")
    if equal and equal["tensor_leak"] is not None:
        yield (
            f"Weights were rounded {_ROUNDING[equal['rounding']]}: of the projected directions, at most "
            f"{equal['tensor_leak']:.1e} is left in a tensor."
        )


EQUIVALENCE = Piece(
    "equivalence",
    _run,
    label="equivalence",
    failures=lambda equal: equal.failures,
    equality=True,
    summary=_summary,
    terminal=_warnings,
    page_head=_sentence,
    card_head=_paragraphs,
)
