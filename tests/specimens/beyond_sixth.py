"""Cosmos 3, dots 3, the Gemmas that are not a plain decoder's, InstructBLIP for video, KOSMOS-2.5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import InstructBlipVideoConfig, Kosmos2_5Config
from transformers.models.cosmos3_edge import Cosmos3EdgeConfig
from transformers.models.cosmos3_omni import Cosmos3OmniConfig
from transformers.models.diffusion_gemma import DiffusionGemmaConfig
from transformers.models.dots3_note import Dots3NoteConfig
from transformers.models.gemma4_unified import Gemma4UnifiedConfig

from specimens import Inputs, Knobs, Specimen
from specimens.beyond_parts import (
    AUDIO,
    END,
    IMAGE,
    PATCH,
    START,
    TOKENS,
    VIDEO,
    VOCABULARY,
    gridded,
    kinds,
    latent_attention,
    marks,
    noise,
    one,
    rope,
    several,
    text_only,
    text_settings,
    vision_settings,
    words,
)


def cosmos3_edge(knobs: Knobs) -> Cosmos3EdgeConfig:
    """A dense decoder with an ungated MLP; never tied."""
    more = {
        "head_dim": knobs.width // knobs.heads,
        "rope_parameters": rope(knobs),
        "attention_bias": knobs.bias,
        "mlp_bias": knobs.bias,
        "tie_word_embeddings": False,
    }
    return Cosmos3EdgeConfig(
        text_config=text_settings(knobs) | more,
        vision_config=vision_settings(num_patches=16),
        projector_hidden_size=20,
        **marks(False),
    )


def cosmos3_edge_inputs(config: Cosmos3EdgeConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids; the frames of a video stand apart."""
    return gridded((3 * PATCH**2,), with_kinds=True, apart=True)


def cosmos3_omni(knobs: Knobs) -> Cosmos3OmniConfig:
    """Qwen 3 VL, deepstack and all."""
    more = {
        "model_type": "qwen3_vl_text",
        "head_dim": knobs.width // knobs.heads,
        "rope_parameters": rope(knobs),
        "attention_bias": knobs.bias,
    }
    vision = vision_settings(
        model_type="qwen3_vl_vision",
        depth=2,
        num_heads=2,
        out_hidden_size=knobs.width,
        temporal_patch_size=2,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    )
    return Cosmos3OmniConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        **marks(knobs.tied),
    )


def cosmos3_omni_inputs(config: Cosmos3OmniConfig) -> Mapping[str, Inputs]:
    """Flat patches of two frames with grids; the frames of a video stand apart."""
    return gridded((3 * 2 * PATCH**2,), with_kinds=True, apart=True)


def dots3_note(knobs: Knobs) -> Dots3NoteConfig:
    """Low-rank attention, indexed and sliding, a dense layer and then experts; the tower has experts too."""
    sliding = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 5,
        "head_dim": 10,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
    }
    more = latent_attention(knobs) | {
        "head_dim": 8,
        "layer_types": ["sliding_attention" if layer % 2 else "indexed_attention" for layer in range(knobs.layers)],
        "sliding_window": 5,
        "mlp_layer_types": ["dense", *["sparse"] * (knobs.layers - 1)],
        "moe_intermediate_size": 12,
        "shared_experts_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": knobs.bias,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
        **{f"swa_{name}": value for name, value in sliding.items()},
    }
    vision = vision_settings(
        mlp_layer_types=["dense", "sparse"],
        moe_intermediate_size=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        adapter_in_dim=16,
        adapter_out_dim=knobs.width,
    )
    audio = {
        "hidden_size": 12,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "feature_size": 16,
        "hop_length": 10,
        "downsample_hidden_size": 4,
        "adapter_input_size": 12,
        "adapter_out_dim": knobs.width,
    }
    return Dots3NoteConfig(
        text_config=text_settings(knobs, **more),
        vision_config=vision,
        audio_config=audio,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def dots3_note_inputs(config: Dots3NoteConfig) -> Mapping[str, Inputs]:
    """Flat patches with grids; eight frames of sound make a token."""
    heard = {"input_features": noise(1, 16, 24), "chunk_sample_lengths": torch.tensor([240])}
    return {**gridded((3 * PATCH**2,)), "audio": one(3, AUDIO) | heard}


def gemma_text(knobs: Knobs, **more: Any) -> dict[str, Any]:
    """Sliding attention and, with larger heads, full attention; norms on outputs too."""
    last = knobs.layers - 1
    kinds_of = ["full_attention" if layer % 2 or layer == last else "sliding_attention" for layer in range(last + 1)]
    return text_settings(
        knobs,
        head_dim=8,
        global_head_dim=16,
        layer_types=kinds_of,
        sliding_window=5,
        attention_bias=knobs.bias,
        final_logit_softcapping=5.0,
        **more,
    )


def places(rows: int, columns: int) -> Tensor:
    """Column and row of every patch of a picture, row by row."""
    return torch.tensor([[column, row] for row in range(rows) for column in range(columns)])


def pictures(shapes: Sequence[tuple[int, int]], width: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Patches of pictures of several shapes and their places, padded with -1 to the largest."""
    most = max(rows * columns for rows, columns in shapes)
    where = torch.full((len(shapes), most, 2), -1)
    for index, (rows, columns) in enumerate(shapes):
        where[index, : rows * columns] = places(rows, columns)
    return noise(len(shapes), most, width, seed=seed), where


def gemma4_unified(knobs: Knobs) -> Gemma4UnifiedConfig:
    """No towers: patches and samples of sound are normed and projected."""
    vision = {
        "patch_size": PATCH,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 16,
        "mm_posemb_size": 8,
        "output_proj_dims": 16,
    }
    return Gemma4UnifiedConfig(
        text_config=gemma_text(knobs),
        vision_config=vision,
        audio_config={"audio_embed_dim": 12},
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=AUDIO,
        **marks(knobs.tied),
    )


def gemma4_unified_inputs(config: Gemma4UnifiedConfig) -> Mapping[str, Inputs]:
    """A token is a patch, or a piece of sound."""

    def seen(shapes: Sequence[tuple[int, int]], suffix: str = "", name: str = "image") -> Inputs:
        patches, where = pictures(shapes, 3 * (2 * PATCH) ** 2)
        return {f"pixel_values{suffix}": patches, f"{name}_position_ids": where}

    film = seen([(2, 2)] * 3, "_videos", "video") | {"num_frames_per_video": torch.tensor([3])}
    heard = {"input_features": noise(1, 3, 12), "input_features_mask": torch.ones(1, 3, dtype=torch.bool)}
    modalities = {
        "text": text_only(),
        "image": one(6) | seen([(2, 3)]),
        "images": several([4, 3, 6]) | seen([(2, 2), (1, 3), (3, 2)]),
        "video": one(12, VIDEO) | film,
        "audio": one(3, AUDIO) | heard,
    }
    return {name: given | {"mm_token_type_ids": kinds(given)} for name, given in modalities.items()}


def diffusion_gemma(knobs: Knobs) -> DiffusionGemmaConfig:
    """One stack of layers twice: it reads the prompt, then it fills a canvas; experts beside every MLP."""
    more = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12}
    vision = vision_settings(
        model_type="gemma4_vision",
        num_key_value_heads=2,
        head_dim=8,
        pooling_kernel_size=2,
        position_embedding_size=12,
    )
    return DiffusionGemmaConfig(
        text_config=gemma_text(knobs, **more),
        vision_config=vision,
        boi_token_id=START,
        eoi_token_id=END,
        image_token_id=IMAGE,
        canvas_length=4,
        tie_word_embeddings=knobs.tied,
    )


def diffusion_gemma_inputs(config: DiffusionGemmaConfig) -> Mapping[str, Inputs]:
    """A token is 2 x 2 patches; the canvas holds any words."""

    def seen(shapes: Sequence[tuple[int, int]]) -> Inputs:
        patches, where = pictures(shapes, 3 * PATCH**2)
        return {"pixel_values": patches, "image_position_ids": where}

    modalities = {
        "text": text_only(),
        "image": one(6) | seen([(4, 6)]),
        "images": several([6, 6, 6]) | seen([(4, 6), (6, 4), (2, 12)]),
    }
    return {
        name: given | {"decoder_input_ids": torch.tensor([words(4, 11), words(4, 12)])[: len(given["input_ids"])]}
        for name, given in modalities.items()
    }


def instructblipvideo(knobs: Knobs, text: str = "opt") -> InstructBlipVideoConfig:
    """OPT, or Llama, behind a Q-Former that sees each frame."""
    more: dict[str, dict[str, Any]] = {
        "opt": {"ffn_dim": 40, "enable_bias": knobs.bias, "word_embed_proj_dim": knobs.width},
        "llama": {"attention_bias": knobs.bias, "mlp_bias": knobs.bias},
    }
    qformer = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
    }
    return InstructBlipVideoConfig(
        text_config=text_settings(knobs, model_type=text, **more[text]),
        vision_config=vision_settings(image_size=16),
        qformer_config=qformer,
        num_query_tokens=3,
        video_token_index=VIDEO,
    )


def instructblipvideo_inputs(config: InstructBlipVideoConfig) -> Mapping[str, Inputs]:
    """Three queries for each of two frames.  The class wants a video with every prompt; the first does not name it."""

    def film(count: int) -> Inputs:
        asked = torch.tensor([words(5, 21 + index) for index in range(count)])
        return {"pixel_values": noise(count, 2, 3, 16, 16), "qformer_input_ids": asked}

    return {
        "text": text_only() | film(2),
        "video": one(6, VIDEO) | film(1),
        "videos": several([6, 6, 6], VIDEO) | film(3),
    }


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


SIXTH = [
    Specimen("cosmos3_edge", cosmos3_edge, cosmos3_edge_inputs),
    Specimen("cosmos3_omni", cosmos3_omni, cosmos3_omni_inputs),
    Specimen("dots3_note", dots3_note, dots3_note_inputs),
    Specimen("gemma4_unified", gemma4_unified, gemma4_unified_inputs),
    Specimen("diffusion_gemma", diffusion_gemma, diffusion_gemma_inputs),
    Specimen("instructblipvideo", instructblipvideo, instructblipvideo_inputs),
    Specimen("instructblipvideo+llama", partial(instructblipvideo, text="llama"), instructblipvideo_inputs),
    Specimen("kosmos-2.5", kosmos2_5, kosmos2_5_inputs),
]
