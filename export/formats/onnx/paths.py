"""Which vision path a family takes, by its outer model type."""

from __future__ import annotations

from transformers import PreTrainedModel

from ....guard.base.errors import InputError
from .grids import DeepGrid, Grid, Native, WindowedGrid
from .vision import Boxed, Prefixed, Shuffled, Tiled, VisionPath

PATHS: dict[str, type[VisionPath]] = {
    "llava": VisionPath,
    "vipllava": VisionPath,
    "llava_next": Tiled,
    "idefics3": Boxed,
    "smolvlm": Boxed,
    "paligemma": Prefixed,
    "internvl": Shuffled,
    "mistral3": Native,
    "qwen2_vl": Grid,
    "qwen2_5_vl": WindowedGrid,
    "qwen3_vl": DeepGrid,
}


def path_of(model: PreTrainedModel) -> VisionPath:
    """Returns the vision path of `model`; InputError naming its type if it has none."""
    kind = model.config.model_type
    if kind not in PATHS:
        raise InputError(f"--format onnx: family {kind!r} has no ONNX graphs yet; known: {', '.join(sorted(PATHS))}")
    if not type(model).__module__.startswith("transformers."):
        raise InputError(f"--format onnx: {type(model).__name__} is code of the model's own, which has no ONNX graphs")
    if PATHS[kind].prefix and "sliding_attention" in (
        getattr(model.config.get_text_config(), "layer_types", None) or ()
    ):
        raise InputError(f"--format onnx: {kind} with sliding windows in its decoder has no ONNX graphs yet")
    return PATHS[kind](model)
