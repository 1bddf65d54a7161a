"""LLaVA around every other decoder that guardfold has a row for."""

from __future__ import annotations

from functools import partial

from specimens import Specimen
from specimens.llava_kind import CLIP, FEATURES, llava, square, untied

DENSE = (
    *("ministral3", "qwen3", "olmo", "smollm3", "helium", "stablelm", "cohere", "ernie4_5", "seed_oss", "internlm3"),
    *("phi3", "glm", "starcoder2", "nemotron", "arcee", "apertus"),
)
POST_NORM = ("olmo3", "glm4", "gemma2", "gemma3_text")
EXPERTS = ("qwen2_moe", "qwen3_moe", "mixtral", "granitemoe", "olmoe", "phimoe", "gpt_oss", "qwen3_next")
TEXT_KIND = [
    Specimen(f"llava+{kind}", partial(llava, "llava", kind, CLIP, FEATURES), square)
    for kind in (*DENSE, *POST_NORM, *EXPERTS)
]
TEXT_KIND.append(Specimen("llava+gpt_neox", partial(untied, "gpt_neox"), square))
