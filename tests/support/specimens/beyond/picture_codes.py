"""Chameleon, Emu 3: pictures are read as codes of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from transformers import ChameleonConfig, Emu3Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import IMAGE, noise, one, plain, several, text_only, text_settings

FIRST_CODE = 50


CODES = 8


END_OF_LINE = 49


def chameleon(knobs: Knobs, swin_norm: bool = False) -> ChameleonConfig:
    """A picture is sixteen codes of the vocabulary.  swin_norm: norms on outputs of sublayers, none on inputs."""
    names = {f"IMGIMG{chr(ord('A') + code)}Z": FIRST_CODE + code for code in range(CODES)}
    quantizer = {
        "embed_dim": 6,
        "num_embeddings": CODES,
        "latent_channels": 6,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    }
    return ChameleonConfig(
        **text_settings(knobs, attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vq_config=quantizer,
        vocabulary_map={"<image>": IMAGE, **names},
        swin_norm=swin_norm,
    )


def chameleon_inputs(config: ChameleonConfig) -> Mapping[str, Inputs]:
    """Four pixels a side for each code."""
    return plain(16, 16)


def emu3(knobs: Knobs) -> Emu3Config:
    """A picture is codes of the vocabulary, each row with an end of line."""
    names = {f"<|visual token {code:06d}|>": FIRST_CODE + code for code in range(CODES)}
    quantizer = {
        "codebook_size": CODES,
        "embed_dim": 6,
        "latent_channels": 6,
        "temporal_downsample_factor": 2,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [1],
        "hidden_size": 32,
    }
    return Emu3Config(
        text_config=text_settings(knobs, attention_bias=knobs.bias, mlp_bias=knobs.bias),
        vq_config=quantizer,
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": END_OF_LINE, **names},
        tie_word_embeddings=knobs.tied,
    )


def emu3_inputs(config: Emu3Config) -> Mapping[str, Inputs]:
    """Four pixels a side for each code, pictures padded to the largest."""
    sizes = torch.tensor([[16, 16], [8, 16], [16, 8]])
    pixels = noise(3, 3, 16, 16)
    return {
        "text": text_only(),
        "image": one(20) | {"pixel_values": pixels[:1], "image_sizes": sizes[:1]},
        "images": several([20, 10, 12]) | {"pixel_values": pixels, "image_sizes": sizes},
    }


PICTURE_CODES = [
    Specimen("chameleon", chameleon, chameleon_inputs),
    Specimen("chameleon+swin_norm", partial(chameleon, swin_norm=True), chameleon_inputs),
    Specimen("emu3", emu3, emu3_inputs),
]
