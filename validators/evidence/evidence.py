"""All the evidence about one guarded folder: integrity, equivalence with leaks, behaviour, verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...export.checkpoint.headers import Checkpoint
from ...export.checkpoint.rounding import Rounding
from ...export.families.table import Family
from ...export.fold import Fold
from ...export.formats.onnx.layout import PRECISIONS
from ...guard.fitting.directions import auc
from ...guard.fitting.states import prompt_states
from ...guard.fitting.transcripts import answer, last_readings
from ...guard.guard import Guard
from ...guard.hooks import attached
from ...guard.interventions import Gate
from ...guard.interventions.base import PerLayer
from ...guard.model.vlm import VLM, load
from ...guard.prompts.image_kinds import IMAGE_KINDS, ImageKind
from ..behaviour.evaluation_prompts import Probes
from ..behaviour.judge import Judge, PhraseJudge
from ..behaviour.measure import Behaviour, measure
from ..behaviour.recorded import asked, record
from ..behaviour.statistics import Rate
from ..behaviour.verdict import Verdict, judge_guard
from ..runtimes.adapted import Adapted, attach, inspect_adapters
from ..runtimes.onnx import Runner
from .divergence import Divergence
from .equivalence import Equivalence, compare
from .integrity import Integrity, inspect_folder
from .runtime import Runtime

NOT_MEASURED = "not measured"


KL_PROMPTS = 48
"""Benign probes whose answers' distributions are compared, under each image kind."""


PROJECTED = 100
SAMPLES = 10
SNIPPET = 100
"""Characters kept of an answer to a harmful prompt."""


@dataclass(frozen=True)
class Sample:
    """One prompt and what both models said; of harmful prompts only the beginning of the answers."""

    kind: ImageKind
    text: str
    harmful: bool
    original: str
    guarded: str


@dataclass(frozen=True)
class Effects:
    """What the guard does inside, by image kind. kl: mean KL(original || with hooks) per token of benign answers, nats.
    auc: how well its detector tells harmful probes from benign ones (empty without a gate).  projections: "harmful" and
    "benign" -> components of up to PROJECTED prompts' last states along v_1 of `layer`, without the guard.
    """

    kl: dict[ImageKind, float]
    auc: dict[ImageKind, float]
    layer: int | None
    projections: dict[ImageKind, dict[str, list[float]]]

    def figures(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What was found, in the order in which it was looked for; a later part is None where an earlier one failed.

    reference: the published two-pass form of the same directions, as hooks on the original.  runtime: ONNX graphs
    against torch, where there are some; in place of the equivalence where hooks are traced into them.
    """

    integrity: Integrity
    equivalence: Equivalence | None
    original: Behaviour | None = None
    guarded: Behaviour | None = None
    reference: Behaviour | None = None
    effects: Effects | None = None
    verdict: Verdict | None = None
    samples: tuple[Sample, ...] = ()
    runtime: Runtime | None = None
    outcomes: Mapping[str, Any] | None = None
    """Of the original, prompt by prompt (recorded.py), so that what is served later can be paired with it."""

    @property
    def sound(self) -> bool:
        """Whether the folder is whole and equal to its hooks, whatever it does."""
        shown = [part for part in (self.equivalence, self.runtime) if part is not None]
        return self.integrity.passed and bool(shown) and all(part.passed for part in shown)

    @property
    def distance_to_reference(self) -> dict[ImageKind, float]:
        """Image kind -> compliance of the guarded weights minus that of the two-pass form: [-1, 1], 0 where equal."""
        if self.guarded is None or self.reference is None:
            return {}
        ours, theirs = self.guarded.kinds, self.reference.kinds
        return {kind: Rate.of(ours[kind].complied).rate - Rate.of(theirs[kind].complied).rate for kind in IMAGE_KINDS}

    @property
    def ruling(self) -> str:
        return self.verdict.ruling if self.verdict else NOT_MEASURED

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the ruling is what it is; for an unsound folder, what is wrong with it."""
        parts = (self.integrity, self.equivalence, self.runtime)
        unsound = tuple(failure for part in parts if part for failure in part.failures)
        return unsound or (self.verdict.reasons if self.verdict else ())

    def figures(self) -> dict[str, Any]:
        """Everything measured, as JSON."""
        parts = ("integrity", "equivalence", "runtime", "original", "guarded", "reference", "effects", "verdict")
        found = {name: getattr(self, name) for name in parts}
        return {
            "ruling": self.ruling,
            **{name: part.figures() if part else None for name, part in found.items()},
            "distance_to_reference": self.distance_to_reference,
            "samples": [asdict(sample) for sample in self.samples],
            "outcomes": self.outcomes,
        }


def examine(
    source: Checkpoint,
    folded: Checkpoint | Adapted,
    family: Family,
    guard: Guard,
    fold: Fold,
    rounding: Rounding,
    probes: Probes | None,
    judge: Judge | None = None,
) -> Evidence:
    """The evidence about `folded`, made from `source` by folding `guard`. Without `probes`, behaviour is not measured.

    rounding: how the weights were rounded.  judge: default, by phrases.  Raises InputError if either folder cannot be
    loaded.
    """
    if isinstance(folded, Adapted):
        integrity = inspect_adapters(folded)
    else:
        integrity = inspect_folder(source, folded, family, fold)
    if not integrity.passed:
        return Evidence(integrity, None)
    equivalence = compare(source, folded, guard, fold, rounding)
    if probes is None or not equivalence.passed:
        return Evidence(integrity, equivalence)
    return _with_behaviour(Evidence(integrity, equivalence), source, folded, guard, probes, judge)


def examine_hooked(source: Checkpoint, guard: Guard, probes: Probes | None, judge: Judge | None = None) -> Evidence:
    """The evidence about `source` with `guard`'s hooks, which graphs shall hold: what it does. Nothing was folded."""
    evidence = Evidence(Integrity(len(source.tensors), 0, (), "the original's own", ()), None)
    return _with_behaviour(evidence, source, None, guard, probes, judge) if probes else evidence


def with_graphs(
    evidence: Evidence, runtime: Runtime, folder: Path, provider: str, probes: Probes | None, judge: Judge | None = None
) -> Evidence:
    """`evidence` with `runtime`, what is known of the graphs in `folder`. Formats too coarse to be equal to torch are
    themselves asked `probes`, and fail unless they are safer than the original."""
    if probes is None or evidence.original is None:
        return replace(evidence, runtime=runtime)
    formats = []
    for each in runtime.formats:
        precision = PRECISIONS[each.precision]
        if math.isinf(precision.tolerance):
            graphs = measure(
                Runner(folder, precision, provider).vlm, probes, judge or PhraseJudge(probes.refusal), each.precision
            )
            verdict = judge_guard(evidence.original, graphs)
            failures = () if verdict.ruling == "safer" else (f"{verdict.ruling}: {verdict.reasons[0]}",)
            each = replace(each, verdict=verdict, failures=(*each.failures, *failures))
        formats.append(each)
    return replace(evidence, runtime=Runtime(tuple(formats)))


def _with_behaviour(
    evidence: Evidence,
    source: Checkpoint,
    folded: Checkpoint | Adapted | None,
    guard: Guard,
    probes: Probes,
    judge: Judge | None,
) -> Evidence:
    """`evidence` with the behaviour of `source` and of what is guarded: `folded`, or without it `source` with hooks."""
    rules = judge or PhraseJudge(probes.refusal)
    vlm = load(source.folder)
    original = measure(vlm, probes, rules, "original")
    reference = measure(vlm, probes, rules, "two-pass", Guard((guard.reference,))) if guard.reference else None
    effects = _effects(vlm, guard, probes)
    if folded is None:
        guarded = measure(vlm, probes, rules, "guarded", guard)
    else:
        del vlm  # one model at a time
        guarded = measure(_load(folded), probes, rules, "guarded")
    return replace(
        evidence,
        original=original,
        guarded=guarded,
        reference=reference,
        effects=effects,
        verdict=judge_guard(original, guarded),
        samples=tuple(_samples(probes, original, guarded)),
        outcomes={"probes": asked(probes), "judge": rules.name, "original": record(original)},
    )


def _load(folded: Checkpoint | Adapted) -> VLM:
    if not isinstance(folded, Adapted):
        return load(folded.folder)
    vlm = load(folded.source.folder)
    return replace(vlm, model=attach(vlm.model, folded.place).get_base_model())


def _samples(probes: Probes, original: Behaviour, guarded: Behaviour) -> Iterator[Sample]:
    """SAMPLES prompts, harmful and benign in turn, spread over image kinds and probes; harmful answers cut short."""
    prompts = [*probes.harmful, *probes.benign]
    for index in range(SAMPLES):
        harmful = index % 2 == 0
        first, count = (0, len(probes.harmful)) if harmful else (len(probes.harmful), len(probes.benign))
        place = first + (index // 2) * count // (SAMPLES // 2)
        kind = IMAGE_KINDS[index // 2 % len(IMAGE_KINDS)]
        before, after = (each.kinds[kind].answers[place] for each in (original, guarded))
        cut = SNIPPET if harmful else None
        yield Sample(kind, prompts[place].text, harmful, before[:cut], after[:cut])


def _effects(vlm: VLM, guard: Guard, probes: Probes) -> Effects:
    kl: dict[ImageKind, float] = {}
    scores: dict[ImageKind, float] = {}
    gate = next((each for each in guard.interventions if isinstance(each, Gate)), None)
    for kind in IMAGE_KINDS:
        divergence = Divergence(vlm, answer(vlm, probes.benign[:KL_PROMPTS], f"answers, {kind}", kind), "reading")
        with attached(vlm.model, guard):
            kl[kind] = divergence.of(vlm.model)
        if gate:
            harmful, benign = (
                last_readings(vlm, prompts, kind, gate.layer, f"detector, {kind}") @ gate.detector
                for prompts in (probes.harmful, probes.benign)
            )
            scores[kind] = auc(harmful, benign)
    layer = max(guard.reference.layers) if guard.reference else None
    return Effects(kl, scores, layer, _projections(vlm, guard.reference, probes) if guard.reference else {})


def _projections(vlm: VLM, reference: PerLayer, probes: Probes) -> dict[ImageKind, dict[str, list[float]]]:
    layer = max(reference.layers)
    along: dict[ImageKind, dict[str, list[float]]] = {kind: {} for kind in IMAGE_KINDS}
    for kind in IMAGE_KINDS:
        for name, prompts in (("harmful", probes.harmful), ("benign", probes.benign)):
            states = prompt_states(vlm, prompts[:PROJECTED], [layer], f"states, {kind}", kind)[layer]
            along[kind][name] = [round(float(value), 4) for value in states @ reference.bases[layer][0].to(states)]
    return along
