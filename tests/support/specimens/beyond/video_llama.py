"""VideoLLaMA 3."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import VideoLlama3Config

from specimens import Inputs, Knobs, Specimen
from specimens.beyond.parts import PATCH, gridded, marks, text_settings, vision_settings


def video_llama_3(knobs: Knobs) -> VideoLlama3Config:
    """Qwen 2; pictures of any size are shrunk by interpolation."""
    return VideoLlama3Config(
        text_config=text_settings(knobs, model_type="qwen2"),
        vision_config=vision_settings(),
        **marks(knobs.tied),
    )


def video_llama_3_inputs(config: VideoLlama3Config) -> Mapping[str, Inputs]:
    """Flat patches with grids, and by how much each picture is to be shrunk."""
    modalities = gridded((3 * PATCH**2,))
    return {
        name: given
        | {key.replace("grid_thw", "merge_sizes"): grid[:, 0] * 0 + 2 for key, grid in given.items() if "grid" in key}
        for name, given in modalities.items()
    }


VIDEO_LLAMA = [
    Specimen("video_llama_3", video_llama_3, video_llama_3_inputs),
]
