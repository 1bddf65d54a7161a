"""Nemotron-H Omni, with latent experts and without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from transformers.models.nemotron_h_omni import NemotronH_Omni_Reasoning_V3_Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import AUDIO, PATCH, marks, noise, one, several, text_only, text_settings


def nemotron_h_omni(knobs: Knobs, latent: int | None = None) -> NemotronH_Omni_Reasoning_V3_Config:
    """One sublayer a layer: Mamba, experts, attention, MLP.

    latent: the width the experts work in, if not the model's own.
    """
    more = {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "head_dim": 8,
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "use_bias": knobs.bias,
        "mamba_proj_bias": knobs.bias,
        "ssm_state_size": 6,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "conv_kernel": 3,
        "chunk_size": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": latent,
    }
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 1.5,
        "patch_size": PATCH,
        "image_size": 16,
        "max_img_size": 16,
        "num_cls_tokens": 1,
        "num_registers": 2,
        "summary_idxs": [0],
        "video_temporal_patch_size": 2,
    }
    audio = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_kernel_size": 3,
        "subsampling_conv_channels": 4,
        "num_mel_bins": 16,
        "projection_hidden_size": 20,
        "projection_bias": knobs.bias,
    }
    text = text_settings(knobs, **more)
    del text["num_hidden_layers"]
    return NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        projector_hidden_size=20,
        vision_hidden_size=16,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def nemotron_h_omni_inputs(config: NemotronH_Omni_Reasoning_V3_Config) -> Mapping[str, Inputs]:
    """Flat patches with grids; eight frames of sound make a token.  No video: this release fails on any."""

    def patches(grids: list[list[int]], seed: int) -> Inputs:
        sizes = torch.tensor(grids)
        return {"pixel_values": noise(int(sizes.prod(1).sum()), 3 * PATCH**2, seed=seed), "image_grid_hw": sizes}

    return {
        "text": text_only(),
        "image": one(6) | patches([[4, 6]], 1),
        "images": several([4, 3, 3]) | patches([[4, 4], [2, 6], [6, 2]], 2),
        "audio": one(3, AUDIO) | {"input_features": noise(1, 24, 16)},
    }


NEMOTRON = [
    Specimen("nemotron_h_omni", nemotron_h_omni, nemotron_h_omni_inputs),
    Specimen("nemotron_h_omni+latent", partial(nemotron_h_omni, latent=20), nemotron_h_omni_inputs),
]
