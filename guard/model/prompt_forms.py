"""How families are asked whose processors bring no chat template, and what those processors take besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """Of a processor that puts the picture's place into a prompt by itself.

    question: what it is given for a question where there is no chat template; {text} is the question.  alone: what its
    tokenizer is given for a prompt without a picture, where the processor itself takes none; {words} is what the
    processor would have been given, {bos} the word that begins a text.  options: of calling the class, where it knows
    them.  needs: a package without which the class fails, though transformers lets it load.
    """

    question: str
    alone: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: str | None = None


FORMS = {
    "PaliGemmaProcessor": Form("answer en {text}", alone="{bos}{words}\n"),
    "Blip2Processor": Form("Question: {text} Answer:"),
    "InstructBlipProcessor": Form("{text}"),
    "FuyuProcessor": Form("{text}\n", options={"return_legacy_image_output": False}, needs="torchvision"),
}
"""Processor class -> its form, as the models' own pages give it."""
