"""How often the verdict is right: guards of known effect, probes drawn by chance. Prints the tables of docs/verdict.md.

python tests/benchmarks/verdict.py --runs 400

Every image kind draws its own outcomes: for rules that must all hold, and for claims of harm of which one is enough,
independent kinds are the hardest case.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from dataclasses import dataclass, replace

from guardfold.guard.prompts.image_kinds import IMAGE_KINDS, TEXT
from guardfold.validators.behaviour.measure import Behaviour, Outcomes
from guardfold.validators.behaviour.verdict import LIMITS, Limits, Ruling, judge_guard

NEAR = 0.35
"""Share of near misses among benign probes, as among the built-in ones."""


@dataclass(frozen=True)
class World:
    """A model and its guard, in rates of prompts.

    complied, answered: the original's.  cut: share of its compliance under pictures that the guard ends.  text_lost,
    kind_lost: refusals that it loses, of those there are, in text and under pictures; text_won: compliance in text that
    it ends.  benign_lost, near_lost: answers that it loses, of those there are.  resampled: share of answers drawn
    anew, which changes nothing on average.
    """

    complied: float = 0.295
    answered: float = 0.97
    cut: float = 0.0
    text_lost: float = 0.0
    kind_lost: float = 0.0
    text_won: float = 0.0
    benign_lost: float = 0.0
    near_lost: float = 0.0
    resampled: float = 0.0


GOOD = World(cut=0.85, text_won=0.85, text_lost=0.0025, kind_lost=0.0025, benign_lost=0.0025, near_lost=0.01)
WORLDS = {
    "a good guard: compliance cut by 85 %, 0.25 % of refusals and answers lost": GOOD,
    "the same, nothing lost": replace(GOOD, text_lost=0.0, kind_lost=0.0, benign_lost=0.0, near_lost=0.0),
    "a modest guard: compliance cut by 65 %, nothing lost": World(cut=0.65, text_won=0.65),
    "no effect": World(),
    "no effect, 5 % of answers drawn anew": World(resampled=0.05),
    "compliance 47.7 -> 43.9 %": World(complied=0.477, cut=0.08),
    "compliance cut by exactly half": World(cut=0.5, text_won=0.5),
    "cut by 85 %, 2 % of text refusals lost": World(cut=0.85, complied=0.3, text_lost=0.02 / 0.7),
    "cut by 85 %, 5 % of text refusals lost": World(cut=0.85, complied=0.3, text_lost=0.05 / 0.7),
    "cut by 85 %, 16 % of text refusals lost and as many won": World(
        cut=0.85, complied=0.3, text_lost=0.23, text_won=0.53
    ),
    "cut by 85 %, 2 % of benign answers lost": World(cut=0.85, text_won=0.85, answered=1.0, benign_lost=0.02),
    "cut by 85 %, 5 % of near misses lost": World(cut=0.85, text_won=0.85, answered=1.0, near_lost=0.05),
    "compliance up by 10 points": World(kind_lost=0.1 / 0.705),
}
SIZES = ((100, 320), (132, 420), (300, 720), (360, 720))


def draw(world: World, harmful: int, benign: int, rng: random.Random) -> tuple[Behaviour, Behaviour]:
    """The original's and the guarded model's outcomes on `harmful` and `benign` probes under every image kind."""
    kinds = {kind: _kind(world, kind == TEXT, harmful, benign, rng) for kind in IMAGE_KINDS}
    return tuple(Behaviour({kind: pair[which] for kind, pair in kinds.items()}, []) for which in (0, 1))  # type: ignore[return-value]


def _kind(world: World, text: bool, harmful: int, benign: int, rng: random.Random) -> tuple[Outcomes, Outcomes]:
    def chance(rate: float) -> bool:
        return rng.random() < rate

    won, lost = (world.text_won, world.text_lost) if text else (world.cut, world.kind_lost)
    was = [chance(world.complied) for _ in range(harmful)]
    now = [did and not chance(won) if did else chance(lost) for did in was]
    now = [chance(world.complied) if chance(world.resampled) else did for did in now]
    near = [place < NEAR * benign for place in range(benign)]
    had = [chance(world.answered) for _ in near]
    has = [
        did and not chance(world.near_lost if odd else world.benign_lost) for did, odd in zip(had, near, strict=True)
    ]
    has = [chance(world.answered) if chance(world.resampled) else did for did in has]
    return Outcomes(was, was, had, [], [], near=near), Outcomes(now, now, has, [], [], near=near)


def rulings(
    world: World, harmful: int, benign: int, runs: int, seed: int = 0, limits: Limits = LIMITS
) -> Counter[Ruling]:
    """How often each ruling is given in `runs` draws."""
    rng = random.Random(seed)
    return Counter(judge_guard(*draw(world, harmful, benign, rng), limits).ruling for _ in range(runs))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=400)
    runs = parser.parse_args().runs
    print("| world | " + " | ".join(f"{harmful} / {benign}" for harmful, benign in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    for name, world in WORLDS.items():
        cells = []
        for harmful, benign in SIZES:
            found = rulings(world, harmful, benign, runs)
            cells.append(f"{found['safer'] / runs:.1%}, {found['not safer'] / runs:.1%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
