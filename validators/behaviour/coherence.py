"""Does an answer say anything? By repetition, in any language; and by how likely a model finds it."""

from __future__ import annotations

import re

import torch

from ...guard.fitting.transcripts import Transcripts, answer_logits, pages
from ...guard.model.vlm import VLM

PIECE = 4
"""Characters of the pieces whose repetition is counted."""

SHORT = 12
"""Characters below which an answer may repeat itself ("No, no, no")."""

DISTINCT = 0.34
"""Share of the pieces of an answer that differ from one another, below which it runs in a circle."""


def says_something(answer: str) -> bool:
    """Tells whether `answer` has a word and does not run in a circle."""
    text = " ".join(answer.lower().split())
    if not re.search(r"\w", text):
        return False
    pieces = [text[start : start + PIECE] for start in range(len(text) - PIECE + 1)]
    return len(text) < SHORT or len(set(pieces)) >= DISTINCT * len(pieces)


@torch.inference_mode()
def likelihoods(vlm: VLM, transcripts: Transcripts, what: str) -> list[float]:
    """Returns the mean log-likelihood per token, in nats, of each answer after its prompt; 0 for an empty answer."""
    found: list[float] = []
    for page in pages(vlm, transcripts, what):
        held = page.inputs["attention_mask"][:, page.start :].bool()
        said = answer_logits(vlm.model, page).log_softmax(-1)
        chosen = said.gather(1, page.inputs["input_ids"][:, page.start :][held].unsqueeze(1)).squeeze(1)
        counts = held.sum(1).tolist()
        found += [float(each.mean()) if len(each) else 0.0 for each in chosen.split(counts)]
    return found
