"""What does the guard do inside? How far it moves benign answers, and what an image does along its direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...guard.fitting.directions import auc
from ...guard.fitting.states import prompt_states
from ...guard.fitting.transcripts import answer
from ...guard.hooks import attached
from ...guard.interventions.base import PerLayer
from ...guard.model.roles import skipped_on_text
from ...guard.model.vlm import VLM
from ...guard.prompts.image_kinds import IMAGE_KINDS, TEXT, ImageKind
from ..behaviour.divergence import KL_PROMPTS, Divergence
from ..behaviour.evaluation_prompts import EvaluationPrompts
from ..report.markup import note, section
from ..report.plots import direction_strips
from .detector import detector_of, detector_scores
from .piece import Context, Piece, Stage, View

PROJECTED = 100


@dataclass(frozen=True)
class Effects:
    """What the guard does inside, by image kind. kl: mean KL(original || with hooks) per token of benign answers, nats.
    auc: how well its detector tells harmful probes from benign ones (empty without one; without text where its layer
    does not run on text).  projections: "harmful" and
    "benign" -> components of up to PROJECTED prompts' last states along v_1 of `layer`, without the guard.
    """

    kl: dict[ImageKind, float]
    auc: dict[ImageKind, float]
    layer: int | None
    projections: dict[ImageKind, dict[str, list[float]]]

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def _run(context: Context) -> Effects | None:
    if (probes := context.probes) is None:
        return None
    vlm, guard = context.original, context.guard
    kl: dict[ImageKind, float] = {}
    scores: dict[ImageKind, float] = {}
    detector = detector_of(guard)
    for kind in IMAGE_KINDS:
        divergence = Divergence(vlm, answer(vlm, probes.benign[:KL_PROMPTS], f"answers, {kind}", kind), "reading")
        with attached(vlm.model, guard):
            kl[kind] = divergence.of(vlm.model)
        if detector and (kind != TEXT or detector.layer not in skipped_on_text(vlm.model)):
            asked = (probes.harmful, probes.benign)
            scores[kind] = auc(*(detector_scores(vlm, detector, prompts, kind) for prompts in asked))
    layer = max(guard.reference.layers) if guard.reference else None
    return Effects(kl, scores, layer, _projections(vlm, guard.reference, probes) if guard.reference else {})


def _projections(vlm: VLM, reference: PerLayer, probes: EvaluationPrompts) -> dict[ImageKind, dict[str, list[float]]]:
    layer = max(reference.layers)
    along: dict[ImageKind, dict[str, list[float]]] = {kind: {} for kind in IMAGE_KINDS}
    for kind in IMAGE_KINDS:
        for name, prompts in (("harmful", probes.harmful), ("benign", probes.benign)):
            states = prompt_states(vlm, prompts[:PROJECTED], [layer], f"states, {kind}", kind)[layer]
            along[kind][name] = [round(float(value), 4) for value in states @ reference.bases[layer][0].to(states)]
    return along


def _summary(effects: Effects) -> str:
    moved = f"benign answers move by KL {max(effects.kl.values()):.1e} nats at most (mean, worst image kind)"
    if not effects.auc:
        return moved
    kind, worst = min(effects.auc.items(), key=lambda item: item[1])
    return f"{moved}; detector AUC {worst:.3f} at least ({kind})"


def _section(view: View) -> Iterator[str]:
    effects = view.figures.get("effects") or {}
    if effects.get("projections"):
        yield section(
            "Harmful and benign prompts along the safety steering direction",
            direction_strips(effects["projections"], effects["layer"]),
            note(
                "Each dot is a prompt in the original model, the tick their mean: what an image does to the distance."
            ),
        )


EFFECTS = Piece("effects", _run, Stage.ORIGINAL, label="effects", summary=_summary, page=_section)
