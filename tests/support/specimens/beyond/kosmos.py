"""KOSMOS-2.5."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import Kosmos2_5Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, PATCH, TOKENS, VOCABULARY, noise, one, places, several, text_only


def kosmos2_5(knobs: Knobs) -> Kosmos2_5Config:
    """Pre-norm with a norm inside the MLP, sinusoidal positions, and an embedding of what is a picture."""
    text = {
        "vocab_size": VOCABULARY,
        "embed_dim": knobs.width,
        "layers": knobs.layers,
        "ffn_dim": 40,
        "attention_heads": knobs.heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": knobs.tied,
        **TOKENS,
    }
    vision = {
        "hidden_size": 16,
        "patch_embed_hidden_size": 3 * PATCH**2,
        "intermediate_size": 24,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_num_patches": 16,
    }
    return Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=3, tie_word_embeddings=knobs.tied)


def kosmos2_5_inputs(config: Kosmos2_5Config) -> Mapping[str, Inputs]:
    """Three latent queries a picture; patches come with their row and column."""

    def seen(given: Inputs, count: int) -> Inputs:
        where = places(3, 4).flip(-1).double() + 1
        patches = torch.cat([where.expand(count, -1, -1), noise(count, 12, 3 * PATCH**2)], dim=-1)
        return given | {
            "flattened_patches": patches,
            "image_embeds_position_mask": (given["input_ids"] == IMAGE).long(),
        }

    return {"text": text_only(), "image": seen(one(3), 1), "images": seen(several([3, 3, 3]), 3)}


KOSMOS = [
    Specimen("kosmos-2.5", kosmos2_5, kosmos2_5_inputs),
]
