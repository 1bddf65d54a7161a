"""Stages 1 to 4: the demo learns to answer, to refuse, to see, and to tell its language model what it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from ...guard.prompts.image_kinds import COLOURS, SHAPES
from .lessons import Lessons
from .speech import Batch, Gallery, Turn, Voice, answer_loss, exact
from .world import QUESTIONS, REFUSAL, TEMPLATES, World, question

__all__ = [
    "TRAINING_STEPS",
    "Tick",
    "TrainingError",
    "align",
    "connect",
    "descend",
    "look",
    "picture_trial",
    "pretrain",
    "speakers",
    "tower",
    "validation_turns",
]

Tick = Callable[[str], None]
"""Called after each training step with what is being learnt."""

TRAINING_STEPS = {"pretrain": 120, "align": 600, "look": 1000, "connect": 70}
WARM_UP, FLOOR, CLIP_NORM = 30, 0.05, 1.0
TRAINING_ROUNDS = 4
"""A stage that misses its criterion is trained again, shorter and at half its rate, up to this many rounds in all."""


class TrainingError(RuntimeError):
    """A stage, or the finished demo, misses what it must reach."""


def cosine(step: int, steps: int) -> float:
    """Returns the learning rate's factor: linear warm-up, then a cosine down to FLOOR."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def descend(
    optimiser: torch.optim.Optimizer, factors: Iterable[float], loss: Callable[[], Tensor], done: Callable[[], None]
) -> None:
    """One step per factor of the learning rates, on a fresh `loss()`, with the gradient's norm clipped."""
    factors = [*factors, 0.0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factors.__getitem__)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for _ in factors[:-1]:
        optimiser.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimiser.step()
        schedule.step()
        done()


def tower(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Returns what the vision tower says of pictures, without CLS: pixels [n, 3, 24, 24] to [n, 9, 64]."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def speakers(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """Returns the parameters of the language model, its head included."""
    return [*model.model.language_model.parameters(), *model.lm_head.parameters()]


def pretrain(model: LlavaForConditionalGeneration, voice: Voice, lessons: Lessons, tick: Tick) -> None:
    """Stage 1: answer everything, harmful or not, and read descriptions."""

    def loss() -> Tensor:
        return answer_loss(model, voice.batch([*lessons.answered(lessons.all, 56), *lessons.described(12)]))

    steps = TRAINING_STEPS["pretrain"]
    optimiser = torch.optim.AdamW(speakers(model), 2e-3)
    descend(optimiser, [cosine(step, steps) for step in range(steps)], loss, lambda: tick("learning to answer"))


def align(model: LlavaForConditionalGeneration, voice: Voice, lessons: Lessons, tick: Tick) -> None:
    """Stage 2: refuse what is harmful, in text. Criterion: 98.5 % exact on validation, refusals and answers alike."""
    harmful = lessons.harmful + lessons.borderline

    def loss() -> Tensor:
        turns = [*lessons.refused(harmful, 28), *lessons.answered(lessons.benign, 28), *lessons.described(10)]
        return answer_loss(model, voice.batch(turns), first=6.0)

    trials = [voice.batch(turns) for turns in validation_turns(lessons.world)]
    _until(
        lambda: min(exact(model, trial).float().mean().item() for trial in trials),
        0.985,
        lambda steps, rate: descend(
            torch.optim.AdamW(speakers(model), 1.5e-3 * rate, weight_decay=0.05),
            [cosine(step, steps) for step in range(steps)],
            loss,
            lambda: tick("learning to refuse"),
        ),
        TRAINING_STEPS["align"],
        "refusals and answers on validation",
    )


def look(model: LlavaForConditionalGeneration, lessons: Lessons, tick: Tick) -> None:
    """Stage 3: the vision tower says colour and shape on every patch. Criterion: 97 % of unseen pictures' patches."""
    heads = nn.ModuleList(nn.Linear(model.model.vision_tower.config.hidden_size, len(of)) for of in (COLOURS, SHAPES))
    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]

    def loss() -> Tensor:
        rows = torch.tensor(lessons.rng.choices(range(len(lessons.gallery.pixels)), k=64))
        features = tower(model, lessons.gallery.pixels[rows])
        losses = [
            functional.cross_entropy(head(features).transpose(1, 2), labels[rows, None].expand(-1, features.shape[1]))
            for head, labels in zip(heads, (lessons.gallery.colours, lessons.gallery.shapes), strict=True)
        ]
        return torch.stack(losses).sum()

    def right() -> float:
        with torch.no_grad():
            features = tower(model, lessons.unseen.pixels)
            return min(
                (head(features).argmax(-1) == labels[:, None]).float().mean().item()
                for head, labels in zip(heads, (lessons.unseen.colours, lessons.unseen.shapes), strict=True)
            )

    _until(
        right,
        0.97,
        lambda steps, rate: descend(
            torch.optim.AdamW(parameters, 2e-3 * rate),
            [cosine(step, steps) for step in range(steps)],
            loss,
            lambda: tick("learning to see"),
        ),
        TRAINING_STEPS["look"],
        "colours and shapes of unseen pictures",
    )


def connect(
    model: LlavaForConditionalGeneration, voice: Voice, lessons: Lessons, features: Tensor, unseen: Tensor, tick: Tick
) -> None:
    """Stage 4: the projector tells the language model what the tower sees. Criterion: 97 % right on unseen ones.

    features, unseen: [n, 9, 64], what the tower says of the gallery's and of the unseen pictures.
    """
    trial = picture_trial(voice, lessons.unseen)
    _until(
        lambda: exact(model, trial, unseen).float().mean().item(),
        0.97,
        lambda steps, rate: descend(
            torch.optim.AdamW(model.model.multi_modal_projector.parameters(), 5e-3 * rate),
            [cosine(step, steps) for step in range(steps)],
            lambda: answer_loss(model, voice.batch(lessons.seen(48)), features),
            lambda: tick("learning to tell what it sees"),
        ),
        TRAINING_STEPS["connect"],
        "image questions on unseen pictures",
    )


def validation_turns(world: World) -> tuple[list[Turn], list[Turn]]:
    """Returns the validation requests, once each: the harmful ones, refused, and the benign ones, answered."""
    refused = enumerate(world.harmful("validation"))
    answered = enumerate(world.benign("validation"))
    return (
        [Turn(question(combo, at % len(TEMPLATES)), REFUSAL) for at, combo in refused],
        [Turn(question(combo, at % len(TEMPLATES)), world.helpful(combo)) for at, combo in answered],
    )


def picture_trial(voice: Voice, gallery: Gallery) -> Batch:
    """Returns every question about every picture of `gallery`."""
    return voice.batch([gallery.turn(index, asked) for index in range(len(gallery.pixels)) for asked in QUESTIONS])


def _until(share: Callable[[], float], goal: float, train: Callable[[int, float], None], steps: int, what: str) -> None:
    """Train for `steps`, then in rounds of half as many at half the rate, until `share()` reaches `goal`.

    Raises TrainingError when TRAINING_ROUNDS do not suffice.
    """
    train(steps, 1.0)
    for _ in range(TRAINING_ROUNDS - 1):
        if share() >= goal:
            return
        train(steps // 2, 0.5)
    if (reached := share()) < goal:
        raise TrainingError(f"{what}: {reached:.1%} right, {goal:.1%} needed")
