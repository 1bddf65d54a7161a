"""What the default gate does to a real model, prompt by prompt: python tests/benchmarks/real_model.py FOLDER

FOLDER: a vision-language model around a safety-aligned language model, or `demo`. The guard is made as `guardfold
extract --guard gate` makes it and attached as hooks; the built-in evaluation prompts are asked with and without it,
under each of --kinds, up to --tokens tokens an answer. Prints, for each kind: harmful prompts not refused before and
after, refusals lost, and plain and near-miss prompts newly refused; and how long making the guard took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence

from guardfold.guard.model.vlm import load, threads_for
from guardfold.guard.prompts.image_kinds import ImageKind
from guardfold.guard.prompts.prompts import Prompt
from guardfold.pipeline.sources import open_source
from guardfold.validators.behaviour.evaluation_prompts import load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge
from guardfold.validators.behaviour.making import GuardOptions, guard_of
from guardfold.validators.behaviour.measure import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kinds", default="text,noise")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--layers", help="of the gate; default: chosen among the upper half")
    parser.add_argument("--rate", type=float, help="of false openings; default: chosen")
    given = parser.parse_args()
    source = open_source(given.model)
    with threads_for(source.folder):
        start = time.perf_counter()
        guard = guard_of(source, GuardOptions(guard="gate", layers=given.layers, false_positive_rate=given.rate))
        print(f"made in {(time.perf_counter() - start) / 60:.1f} min:", guard.provenance["selection"]["chosen"])
        vlm, prompts = load(source.folder), load_evaluation_prompts(source.folder)
        judge = PhraseJudge(prompts.refusal, prompts.phrases)

        def ask(asked: Sequence[Prompt], kind: ImageKind) -> Iterator[list[str]]:
            """Answers of the original, then of the guarded model."""
            for what, hooks in (("original", None), ("guarded", guard)):
                yield generate(vlm, asked, f"{what}, {kind}", kind, hooks, given.tokens)

        for kind in given.kinds.split(","):
            harmful = prompts.harmful
            was, now = (
                [judge.refuses(prompt.text, said) for prompt, said in zip(harmful, answers, strict=True)]
                for answers in ask(harmful, kind)
            )
            lost = sum(a and not b for a, b in zip(was, now, strict=True))
            print(f"{kind}: {len(was)} harmful, not refused {was.count(False)} -> {now.count(False)}, lost {lost}")
            for name, near in (("plain", False), ("near-miss", True)):
                asked = [p for p in prompts.benign if (p.text in prompts.near) == near]
                was, now = ([judge.refuses_first(said) for said in answers] for answers in ask(asked, kind))
                new = sum(b and not a for a, b in zip(was, now, strict=True))
                print(f"{kind}: {len(was)} {name}, refused {sum(was)} -> {sum(now)}, newly {new}")


if __name__ == "__main__":
    main()
