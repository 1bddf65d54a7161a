"""What the tiny models share: token ids, text and vision configs, batches of token ids, pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specimens import Inputs, Knobs

VOCAB = 64
PAD, BOS, EOS, IMAGE, VIDEO, START, END = range(7)
FIRST_WORD = 16
SIDE, PATCH = 16, 4
GRID = SIDE // PATCH
BIAS_FLAGS = {
    "llama": ("attention_bias", "mlp_bias"),
    "granite": ("attention_bias", "mlp_bias"),
    "opt": ("enable_bias",),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "olmo2", "cohere", "cohere2", "qwen3"), ("attention_bias",)),
}
HEAD_DIM = {"llama", "mistral", "gemma", "gemma2", "gemma3_text", "helium", "qwen3"}


def language(kind: str, knobs: Knobs, **more: Any) -> dict[str, Any]:
    """The text model's config as a dict, `more` on top."""
    size = {"intermediate_size": 40, "num_key_value_heads": knobs.kv_heads}
    if kind == "opt":
        size = {"ffn_dim": 40}
    if kind in HEAD_DIM:
        size["head_dim"] = knobs.width // knobs.heads
    return {
        "model_type": kind,
        "vocab_size": VOCAB,
        "hidden_size": knobs.width,
        "num_hidden_layers": knobs.layers,
        "num_attention_heads": knobs.heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": knobs.tied,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **size,
        **dict.fromkeys(BIAS_FLAGS.get(kind, ()), knobs.bias),
        **more,
    }


def vision(kind: str, **more: Any) -> dict[str, Any]:
    """A two-layer vision tower's config as a dict, of width 16, `more` on top."""
    return {
        "model_type": kind,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(count: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(100 + seed)
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=draw).tolist()


def sentence(*pictures: list[int], seed: int = 0) -> list[int]:
    """Two words, each picture's tokens with a word after it, two more words."""
    row = [BOS, *words(2, seed)]
    for i, tokens in enumerate(pictures):
        row += [*tokens, *words(1, seed + 10 + i)]
    return row + words(2, seed + 1)


def batch(*rows: list[int]) -> Inputs:
    """Rows of token ids, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def text() -> Inputs:
    return batch([BOS, *words(8, 1)], [BOS, *words(5, 2)])


def pictures(*counts: int, token: int = IMAGE) -> Inputs:
    """Two rows, the first with one picture, the second with all others; a picture per count of tokens."""
    runs = [[token] * count for count in counts]
    if len(runs) == 1:
        return batch(sentence(runs[0]))
    return batch(sentence(runs[0]), sentence(*runs[1:], seed=3))
