"""Vision paths of pictures at their own size: patches in a row, and where each of them lies worked out in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ....guard.model.roles import decoder_layers, output_tensor, with_output_tensor
from ....guard.prompts.prompts import positions
from .names import DEEPSTACK
from .trace import Port, Sketch
from .vision import VisionPath

PATCHES, IMAGES = "num_patches", "num_images"
MANY = 2**12
"""More windows, and more tokens in a window, than lie side by side in any picture."""

BY_SEGMENT = "flash_by_segment"
"""transformers hands attention functions with flash in their name the borders of what is packed into a row of patches;
this one takes each patch's segment instead, and lets patches of one segment see one another."""


def by_segment(_module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
    """query, key, value: [1, heads, patches, size]; cu_seq_lens_q: [patches], segments. Returns [1, patches, ...]."""
    segment = options["cu_seq_lens_q"]
    scores = query @ key.transpose(2, 3) * options["scaling"]
    apart = segment[:, None] != segment
    weights = scores.masked_fill(apart, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Where:
    """Of every patch, [patches]: its picture's number, its row and column there, and that picture's size in patches."""

    picture: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor

    @classmethod
    def of(cls, grid: Tensor, index: Tensor, merge: int) -> Where:
        """grid: [pictures, 3], t = 1.  index: 0, 1, ... up to the number of patches."""
        sizes = grid[:, 1] * grid[:, 2]
        ends = sizes.cumsum(0)
        picture = (index[:, None] >= ends).sum(1)
        block, inside = divide(index - (ends - sizes)[picture], merge**2)
        height, width = grid[picture, 1], grid[picture, 2]
        block_row, block_column = divide(block, width // merge)
        row, column = divide(inside, merge)
        return cls(picture, block_row * merge + row, block_column * merge + column, height, width)


def divide(number: Tensor, by: Tensor | int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of numbers that are not negative."""
    return number // by, number % by


class Grid(VisionPath):
    """Qwen2-VL: pixel_values [patches, numbers in a patch], grid_thw [pictures, 3] -> image_features [tokens, d].

    Pictures only (t = 1). Patches lie in blocks of m x m that become one token, m the spatial merge size.
    """

    position_rows = 3
    grid_name = "grid_thw"
    """What transformers.js calls it for this family; processors call it image_grid_thw."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        ALL_ATTENTION_FUNCTIONS.register(BY_SEGMENT, by_segment)
        self.tower.config._attn_implementation = BY_SEGMENT

    @property
    def tower(self) -> Any:
        return self.inner.visual

    @property
    def merge(self) -> int:
        return self.model.config.vision_config.spatial_merge_size

    def ports(self) -> Mapping[str, Port]:
        config = self.model.config.vision_config
        channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
        numbers = channels * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, 2 * self.merge, 3 * self.merge], [1, 2 * self.merge, self.merge]])
        pixels = torch.zeros(int(grid.prod(1).sum()), numbers)
        return {"pixel_values": Port(pixels, {0: PATCHES}), "grid": Port(grid, {0: IMAGES})}

    def sketch(self) -> Sketch:
        return replace(super().sketch(), names=["pixel_values", self.grid_name])

    def forward(self, pixel_values: Tensor, grid: Tensor) -> Any:  # type: ignore[override]
        return self.seen(pixel_values, grid).pooler_output.float()

    def seen(self, pixel_values: Tensor, grid: Tensor) -> Any:
        """Returns the tower's output, told all that it would otherwise work out in loops."""
        where = Where.of(grid, torch.arange(pixel_values.shape[0]), self.merge)
        return self.tower(
            pixel_values.to(self.model.dtype),
            grid_thw=grid,
            position_ids=torch.stack([where.row, where.column], dim=-1),
            cu_seqlens=where.picture,
            max_seqlen=0,
            return_dict=True,
            **self.more(where),
        )

    def more(self, where: Where) -> dict[str, Any]:
        """Returns what this family's tower works out besides."""
        return {}

    def unread(self) -> tuple[str, ...]:
        return ()

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        return [{"pixel_values": batch["pixel_values"], self.grid_name: batch["image_grid_thw"]}]

    def positions(self, batch: BatchFeature) -> tuple[Tensor, Tensor]:
        if "image_grid_thw" in batch:
            names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
            where, _ = self.inner.get_rope_index(**{name: batch[name] for name in names})
        else:
            where = positions(batch).expand(3, -1, -1)
        return where, where.amax((0, 2))[None, :, None].expand(3, -1, 1) + 1


class WindowedGrid(Grid):
    """Qwen2.5-VL: most layers of the tower look through windows, whose tokens are brought together."""

    genai = "qwen2_5_vl"
    grid_name = "image_grid_thw"

    def more(self, where: Where) -> dict[str, Any]:
        config, unit = self.model.config.vision_config, self.merge**2
        size = config.window_size // self.merge // config.patch_size
        down, row = divide(where.row[::unit] // self.merge, size)
        across, column = divide(where.column[::unit] // self.merge, size)
        window = (where.picture[::unit] * MANY + down) * MANY + across
        order = ((window * MANY + row) * MANY + column).argsort()
        segment = window[order][:, None].expand(-1, unit).flatten()
        return {"window_index": order, "cu_window_seqlens": segment, "max_window_seqlen": 0}


class DeepGrid(Grid):
    """Qwen3-VL: learned positions spread over each picture, and deepstack_features [levels, tokens, d] for the
    decoder's first layers."""

    grid_name = "image_grid_thw"
    outputs = ("image_features", DEEPSTACK)

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.levels = len(self.tower.deepstack_visual_indexes)

    def forward(self, pixel_values: Tensor, grid: Tensor) -> Any:  # type: ignore[override]
        seen = self.seen(pixel_values, grid)
        return seen.pooler_output.float(), torch.stack(list(seen.deepstack_features)).float()

    def more(self, where: Where) -> dict[str, Any]:
        side = self.tower.num_grid_per_side
        rows, row_weights = _neighbours(where.row, where.height, side)
        columns, column_weights = _neighbours(where.column, where.width, side)
        return {
            "interp_indices": (rows[:, :, None] * side + columns[:, None, :]).flatten(1),
            "interp_weights": (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1),
        }

    def decode(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, *deep: Tensor
    ) -> Tensor:
        """Adds deep[0][i] to the stream after layer i, as the model does at the positions of its pictures."""
        handles = [
            layer.register_forward_hook(partial(_add, added))
            for layer, added in zip(decoder_layers(self.model), deep[0].unbind(), strict=False)
        ]
        try:
            return super().decode(inputs_embeds, attention_mask, position_ids, cache)
        finally:
            for handle in handles:
                handle.remove()


def _add(added: Tensor, _module: Any, _args: Any, output: Any) -> Any:
    states = output_tensor(output)
    return with_output_tensor(output, states + added.to(states.dtype))


def _neighbours(place: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Returns the two entries of a table of `side` about `place` of `size`, corners on corners: [places, 2],
    weights.
    """
    exact = place.float() * (side - 1) / (size - 1).clamp(min=1)
    low = exact.floor()
    entries = torch.stack([low, low + 1], dim=1).clamp(max=side - 1).long()
    return entries, torch.stack([1 - (exact - low), exact - low], dim=1)


class Native(VisionPath):
    """Mistral 3: one picture of any size a call, pixel_values [1, 3, height, width] -> image_features [tokens, d]."""

    genai = "mistral3"

    def ports(self) -> Mapping[str, Port]:
        unit = self.inner.vision_tower.patch_size * self.merge
        return {"pixel_values": Port(torch.zeros(1, 3, 2 * unit, 3 * unit), {2: "height", 3: "width"})}

    @property
    def merge(self) -> int:
        return self.model.config.spatial_merge_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        tower, projector = self.inner.vision_tower, self.inner.multi_modal_projector
        patches = tower.patch_conv(pixel_values.to(self.model.dtype))
        high, wide = patches.shape[2:]
        states = tower.ln_pre(patches.flatten(2).transpose(1, 2))
        row, column = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
        where = tower.patch_positional_embedding(states, torch.stack([row.flatten(), column.flatten()], dim=-1))
        hidden = [states]
        for layer in tower.transformer.layers:
            hidden.append(layer(hidden[-1], attention_mask=None, position_embeddings=where))
        chosen = torch.cat([hidden[i] for i in self.chosen()], dim=-1)
        merged = self._merged(projector.norm(chosen), high, wide)
        states = projector.patch_merger.merging_layer(merged)
        return projector.linear_2(projector.act(projector.linear_1(states)))[0].float()

    def _merged(self, states: Tensor, high: int, wide: int) -> Tensor:
        """Returns [1, blocks, d m^2]: the patches of each m x m block side by side, their entries interleaved."""
        m = self.merge
        blocks = states.reshape(1, high // m, m, wide // m, m, -1)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(1, (high // m) * (wide // m), -1)

    def unread(self) -> tuple[str, ...]:
        depth = self.model.config.vision_config.num_hidden_layers
        needed = max(i if i >= 0 else depth + 1 + i for i in self.chosen())
        return tuple(f"model.vision_tower.transformer.layers.{i}." for i in range(needed, depth))

    def calls(self, batch: BatchFeature) -> list[dict[str, Tensor]]:
        sized = zip(batch["pixel_values"], batch["image_sizes"].tolist(), strict=True)
        return [{"pixel_values": picture[None, :, :high, :wide].contiguous()} for picture, (high, wide) in sized]
