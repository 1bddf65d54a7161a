"""The same request in other words: what a detector is shown so that it learns what is asked and not how.

A request that begins with one of HEADS and goes on with a plain verb phrase ("How to bake a cake?") can begin with any
of FORMS. Measured on a real model with 780 pairs: other forms of them raised recall of unseen wordings from .71 to .76.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

FORMS = (
    *("How to {}?", "How do I {}?", "How can I {}?", "What is the best way to {}?", "Can you help me {}?"),
    *("Help me {}.", "Explain how to {}.", "Tell me how to {}.", "Describe how to {}.", "Show me how to {}."),
    *("Give me a way to {}.", "Write a plan to {}.", "List the steps to {}.", "Suggest a way to {}."),
    *("Write instructions to {}.", "I want to {}. How do I start?", "I need to {}. What should I do?"),
)
HEADS = "|".join(
    (
        r"How (?:to|(?:do|can|could|would|should) I)",
        r"(?:Please )?[Hh]elp me(?: to)?",
        r"(?:Explain|Describe|Tell me|Show me|Teach me)(?: step by step)? how (?:to|I can|I could)",
        r"Teach me to",
        r"(?:Give me|Suggest|Come up with|Is there|Please suggest) (?:a|one) (?:\w+ )?way to",
        r"(?:What are some|Give me some|List|List some|Suggest some) (?:\w+ )?ways to",
        r"(?:List|What are|Outline|Walk me through) the steps to",
        r"Write instructions to",
        r"Show how one could",
        r"What do I need to",
        r"(?:Write|Make|Draft|Outline) a (?:\w+ )?plan to",
        r"What is the (?:\w+ )?way to",
        r"Can you (?:help me|(?:show me|explain|tell me) how to)",
        r"(?:I (?:want|need)|I'd like|I'm (?:trying|looking|planning)) to",
    )
)
REQUEST = re.compile(
    rf"(?:{HEADS}) (?P<does>[a-z][^.?!]*)[.?!](?: (?:How do I start|What should I do|How do I do it)\?)?"
)
NO_VERB = re.compile(r"(?:be|not|my|the|an?|i|we|is|are|it|some\w+|\w+ing)\b", re.IGNORECASE)


def verb_phrase(request: str) -> str | None:
    """Returns what `request` asks how to do, as "bake a cake"; None where it is no such request."""
    found = REQUEST.fullmatch(request)
    return None if found is None or NO_VERB.match(found["does"]) else found["does"]


def reworded(requests: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Returns up to `count` other wordings of `requests`, each for all of them alike; the same ones in every run.

    None where one of `requests` is no plain verb phrase asked for: a pair keeps its grammar on both sides.
    """
    phrases = [verb_phrase(request) for request in requests]
    if None in phrases:
        return []
    other = [form for form in FORMS if not any(form.format(p) == r for p, r in zip(phrases, requests, strict=True))]
    chosen = random.Random(requests[0]).sample(other, min(count, len(other)))
    return [tuple(form.format(phrase) for phrase in phrases) for form in chosen]
