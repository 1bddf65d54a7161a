"""How far a guard moves answers that it should leave alone: KL of next-token distributions along them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...guard.fitting.transcripts import Transcripts, answer_logits, pages
from ...guard.model.vlm import VLM

KL_PROMPTS = 48
"""Benign prompts whose answers' distributions are compared, of each sort or under each image kind."""


class Divergence:
    """The original's distributions over its own answers, kept to compare with: float16 logits of every token."""

    def __init__(self, vlm: VLM, transcripts: Transcripts, what: str) -> None:
        self.pages = list(pages(vlm, transcripts, what))
        self.logits = [answer_logits(vlm.model, page).half() for page in self.pages]

    @torch.inference_mode()
    def of(self, model: Any) -> float:
        """Returns mean KL(original || model) per answer token, in nats."""
        total, count = 0.0, 0
        for page, before in zip(self.pages, self.logits, strict=True):
            after = answer_logits(model, page).log_softmax(-1)
            reference = before.float().log_softmax(-1)
            total += float(F.kl_div(after, reference, log_target=True, reduction="sum"))
            count += len(after)
        return total / max(1, count)
