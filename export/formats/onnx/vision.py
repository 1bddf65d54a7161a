"""The vision graph of each family: how pixels become what takes the place of image tokens, and what clients do with it.

One class per vision path; paths.py says which outer model type takes which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BatchFeature, Cache, PreTrainedModel

from ....guard.prompts.prompts import positions
from .names import BATCH
from .trace import Port, Sketch


class VisionPath(nn.Module):
    """pixel_values [images, 3, height, width] -> image_features [images, tokens, d], float32: tower, then projector."""

    outputs: ClassVar[tuple[str, ...]] = ("image_features",)
    position_rows: ClassVar[int | None] = None
    """Rows of position_ids where they come in several (multimodal rotary positions), else None."""
    first_position: ClassVar[int] = 0
    """The position of a prompt's first token."""
    prefix: ClassVar[bool] = False
    """Whether all of a prompt sees all of it, so that it cannot be computed in pieces."""
    genai: ClassVar[str | None] = None
    """What onnxruntime-genai calls this family, if it knows it."""
    levels: int = 0
    """How many of the decoder's first layers get features of their own."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def inner(self) -> Any:
        return self.model.model

    def forward(self, pixel_values: Tensor) -> Any:
        return self.inner.multi_modal_projector(self.selected(pixel_values.to(self.model.dtype))).float()

    def selected(self, pixels: Tensor) -> Tensor:
        """Returns what the projector reads: the tower's chosen layers side by side, without the class token where it
        is.
        """
        hidden = self.inner.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
        drop = int(getattr(self.model.config, "vision_feature_select_strategy", "default") == "default")
        return torch.cat([hidden[i][:, drop:] for i in self.chosen()], dim=-1)

    def chosen(self) -> list[int]:
        """Returns the tower's layers whose outputs are read, as the config counts them."""
        layers = self.model.config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    def ports(self) -> Mapping[str, Port]:
        return {"pixel_values": Port(torch.zeros(2, 3, *self.sides()), {0: BATCH})}

    def sides(self) -> tuple[int, int]:
        """Height and width of what the tower sees."""
        side = self.model.config.vision_config.image_size
        return (side, side) if isinstance(side, int) else tuple(side)

    def sketch(self) -> Sketch:
        ports = self.ports()
        return Sketch(self, ports, list(ports), list(self.outputs))

    def unread(self) -> tuple[str, ...]:
        """Prefixes of parameters on which nothing that the model says depends: layers above the highest one chosen."""
        depth = self.model.config.vision_config.num_hidden_layers
        needed = max(i if i >= 0 else depth + 1 + i for i in self.chosen())
        dead = tuple(f"model.vision_tower.encoder.layers.{i}." for i in range(needed, depth))
        return ("model.vision_tower.post_layernorm.", "model.vision_tower.head.", *dead)

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        """Returns what the graph is called with for a processor's `batch`, once for each entry."""
        return [{name: batch[name] for name in self.ports()}]

    def tokens(self, results: list[dict[str, Tensor]], batch: BatchFeature) -> Tensor:
        """Returns [image tokens, d]: what takes the place of the image tokens of `batch`, in their order."""
        return torch.cat([result["image_features"].flatten(0, -2) for result in results])

    def positions(self, batch: BatchFeature) -> tuple[Tensor, Tensor]:
        """Returns (position_ids of `batch`, those of the token after it)."""
        where = positions(batch) + self.first_position
        return where, where[:, -1:] + 1

    def decode(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, *_deep: Tensor
    ) -> Tensor:
        """Returns [batch, positions, vocabulary], with this call's keys and values put into `cache`."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": cache}
        model: Any = self.model
        return model(inputs_embeds=inputs_embeds, use_cache=True, **inputs).logits


class Tiled(VisionPath):
    """The same for every tile of every picture, and image_newline [1, d], which ends each row of a picture's tiles."""

    outputs = ("image_features", "image_newline")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(pixel_values), self.inner.image_newline[None].float()

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
        packed, _ = self.inner.pack_image_features(
            results[0]["image_features"].split(self._counts(batch)),
            batch["image_sizes"],
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            image_newline=results[0]["image_newline"][0],
        )
        return torch.cat(list(packed))


class Shuffled(VisionPath):
    """InternVL: a tile's features, four neighbours merged into one."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.inner.get_image_features(pixel_values, return_dict=True).pooler_output.float()

    def unread(self) -> tuple[str, ...]:
        return ("model.vision_tower.embeddings.mask_token",)


class Prefixed(VisionPath):
    """PaliGemma: the tower's last layer; a prompt sees all of itself, positions begin at 1."""

    first_position = 1
    prefix = True

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.model.dtype)
        return self.inner.multi_modal_projector(self.inner.vision_tower(pixels).last_hidden_state).float()

    def unread(self) -> tuple[str, ...]:
        return ("model.vision_tower.head.",)

    def decode(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, *_deep: Tensor
    ) -> Tensor:
        new, total = inputs_embeds.shape[1], attention_mask.shape[1]
        key = torch.arange(total)
        query = torch.arange(new) + (total - new)
        begins = query[:1] == 0  # nothing is past: this is a prompt
        visible = ((key <= query[:, None]) | begins) & attention_mask[:, None, None].bool()
        low = torch.finfo(inputs_embeds.dtype).min
        mask = torch.where(visible, 0.0, low).to(inputs_embeds.dtype)
        return super().decode(inputs_embeds, mask, position_ids, cache)


class Boxed(VisionPath):
    """Idefics 3 and SmolVLM: rows of pictures of one size with a mask of their pixels; a picture of zeros is none.

    pixel_values [rows, pictures, 3, height, width], pixel_attention_mask [rows, pictures, height, width], bool ->
    image_features [pictures that are some, tokens, d].
    """

    def ports(self) -> Mapping[str, Port]:
        sides, axes = self.sides(), {0: BATCH, 1: "num_images"}
        mask = torch.ones(2, 3, *sides, dtype=torch.bool)
        return {"pixel_values": Port(torch.zeros(2, 3, 3, *sides), axes), "pixel_attention_mask": Port(mask, axes)}

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        config = self.model.config.vision_config
        pixels, seen = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        real = (pixels != 0).flatten(1).any(1)
        high, wide = (side // config.patch_size for side in self.sides())
        patches = seen.unflatten(2, (wide, -1)).unflatten(1, (high, -1)).any(4).any(2)
        patches = patches | ~real[:, None, None]  # what sees nothing at all would be nan
        states = self.inner.vision_model(pixels.to(self.model.dtype), patch_attention_mask=patches).last_hidden_state
        return self.inner.connector(states)[real].float()

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        pixels = batch["pixel_values"]
        mask = batch.get("pixel_attention_mask", torch.ones_like(pixels[:, :, 0]))
        return [{"pixel_values": pixels, "pixel_attention_mask": mask.bool()}]

    def unread(self) -> tuple[str, ...]:
        return ()
