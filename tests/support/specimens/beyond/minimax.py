"""MiniMax M3."""

from __future__ import annotations

from transformers import MiniMaxM3VLConfig

from specimens import Knobs, Specimen
from specimens.beyond.parts import IMAGE, VIDEO, text_settings, two_frame_patches, vision_settings


def minimax_m3_vl(knobs: Knobs) -> MiniMaxM3VLConfig:
    """Full attention and attention to chosen blocks, a dense layer and then experts with a shared one."""
    layers = max(knobs.layers, 3)
    more = {
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * (layers - 1)],
        "mlp_layer_types": ["dense", *["sparse"] * (layers - 1)],
        "head_dim": 8,
        "rotary_dim": 4,
        "intermediate_size": 12,
        "dense_intermediate_size": 40,
        "shared_intermediate_size": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "index_n_heads": knobs.kv_heads,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 3,
    }
    return MiniMaxM3VLConfig(
        text_config=text_settings(knobs, num_hidden_layers=layers, **more),
        vision_config=vision_settings(temporal_patch_size=2, image_size=16, num_attention_heads=1),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=20,
        tie_word_embeddings=knobs.tied,
    )


MINIMAX = [
    Specimen("minimax_m3_vl", minimax_m3_vl, two_frame_patches),
]
