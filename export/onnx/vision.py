"""The vision graph of each family: how pixels become what takes the place of image tokens, and what clients do with it.

One class per vision path; PATHS says which outer model type takes which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature, PreTrainedModel

from ...guard.errors import InputError
from .decoder import BATCH
from .trace import Port, Sketch

IMAGES = "num_images"


class VisionPath(nn.Module):
    """pixel_values [images, 3, height, width] -> image_features [images, tokens, d], float32: tower, then projector."""

    extra: ClassVar[tuple[str, ...]] = ()
    """Inputs of forward after pixel_values, by the names the processor gives them."""
    outputs: ClassVar[tuple[str, ...]] = ("image_features",)
    position_rows: ClassVar[int | None] = None
    first_position: ClassVar[int] = 0
    """The position of a prompt's first token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def inner(self) -> Any:
        return self.model.model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.inner.multi_modal_projector(self.selected(pixel_values.to(self.model.dtype))).float()

    def selected(self, pixels: Tensor) -> Tensor:
        """What the projector reads: the tower's chosen layers side by side, without the class token where it is."""
        config = self.model.config
        hidden = self.inner.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        layers = config.vision_feature_layer
        drop = int(getattr(config, "vision_feature_select_strategy", "default") == "default")
        return torch.cat([hidden[i][:, drop:] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)

    def ports(self) -> Mapping[str, Port]:
        side = self.model.config.vision_config.image_size
        return {"pixel_values": Port(torch.zeros(2, 3, side, side), {0: BATCH})}

    def sketch(self) -> Sketch:
        ports = self.ports()
        return Sketch(self, ports, list(ports), list(self.outputs))

    def unread(self) -> tuple[str, ...]:
        """Prefixes of parameters on which no output of the model depends: layers above the highest one selected."""
        layers = self.model.config.vision_feature_layer
        depth = self.model.config.vision_config.num_hidden_layers
        needed = max(i if i >= 0 else depth + 1 + i for i in ([layers] if isinstance(layers, int) else layers))
        dead = tuple(f"model.vision_tower.encoder.layers.{i}." for i in range(needed, depth))
        return ("model.vision_tower.post_layernorm.", "model.vision_tower.head.", *dead)

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        """What the graph is called with for a processor's `batch`, once for each list entry."""
        return [{name: batch[name] for name in ("pixel_values", *self.extra)}]

    def tokens(self, results: list[dict[str, Tensor]], batch: BatchFeature) -> Tensor:
        """[image tokens, d]: what takes the place of the image tokens of `batch`, in their order."""
        return torch.cat([each["image_features"].flatten(0, -2) for each in results])


class Tiled(VisionPath):
    """The same for every tile of every picture, and image_newline [d], which ends each row of a picture's tiles."""

    outputs = ("image_features", "image_newline")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(pixel_values), self.inner.image_newline.float()

    def _counts(self, batch: BatchFeature) -> list[int]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config = self.model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in batch["image_sizes"].tolist()
        ]

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        pictures = zip(batch["pixel_values"], self._counts(batch), strict=True)
        return [{"pixel_values": torch.cat([tiles[:count] for tiles, count in pictures])}]

    def tokens(self, results: list[dict[str, Tensor]], batch: BatchFeature) -> Tensor:
        features = results[0]["image_features"].split(self._counts(batch))
        packed, _ = self.inner.pack_image_features(
            features,
            batch["image_sizes"],
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_newline=results[0]["image_newline"],
        )
        return torch.cat(list(packed))


PATHS: dict[str, type[VisionPath]] = {
    "llava": VisionPath,
    "vipllava": VisionPath,
    "llava_next": Tiled,
}


def path_of(model: PreTrainedModel) -> VisionPath:
    """The vision path of `model`; InputError naming its type if it has none."""
    kind = model.config.model_type
    if kind not in PATHS:
        raise InputError(f"--format onnx: family {kind!r} has no ONNX graphs yet; known: {', '.join(sorted(PATHS))}")
    return PATHS[kind](model)
