"""Tiny random models of real classes, made on the spot: biases and gains perturbed, so that nothing is zero."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

WORDS = (
    "how to bake bread at home do people usually travel work and why some of them prefer walk the a open lock steal "
    "car paint wall ? , . user assistant :"
).split()
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SIDE, PATCH = 24, 8


@dataclass(frozen=True)
class Tiny:
    """A tiny model's shape. bias: attention and MLP output biases where the text model has them."""

    family: str = "llava"
    text: str = "llama"
    width: int = 32
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    bias: bool = True
    projector_bias: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def config(self) -> Any:
        text: dict[str, Any] = {
            "model_type": self.text,
            "vocab_size": len(WORDS) + 4,
            "hidden_size": self.width,
            "intermediate_size": 48,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.text == "llama":
            text |= {"attention_bias": self.bias, "mlp_bias": self.bias}
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        )
        extra: dict[str, Any] = {"vision_feature_layer": [-1, -2]} if self.family == "vipllava" else {}
        if self.family != "vipllava":
            extra = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
        if self.family == "llava_next":
            extra["image_grid_pinpoints"] = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
        return AutoConfig.for_model(
            self.family,
            text_config=text,
            vision_config=vision.to_dict(),
            image_token_id=3,
            multimodal_projector_bias=self.projector_bias,
            tie_word_embeddings=self.tied,
            **extra,
        )

    def model(self) -> Any:
        """The model with every parameter drawn at random, norm gains about 1."""
        torch.manual_seed(self.seed)
        model = AutoModelForImageTextToText.from_config(self.config()).eval()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.3 * noise)
                else:
                    parameter.copy_(noise * (0.5 if parameter.ndim == 1 else 1.5 / parameter[0].numel() ** 0.5))
        return model

    def save(self, folder: Path, *, max_shard_size: str = "5GB", legacy: bool = True, processor: bool = True) -> Path:
        """Writes model and processor; `legacy` keeps the hub's key style, else names on disk are those in memory."""
        model = self.model().to(self.dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=legacy)
        if processor:
            self.processor().save_pretrained(folder)
        return folder

    def processor(self) -> Any:
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<image>", *dict.fromkeys(WORDS)])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens={"image_token": "<image>"},
        )
        common = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "chat_template": TEMPLATE}
        size = {"shortest_edge": SIDE}
        crop = {"height": SIDE, "width": SIDE}
        if self.family == "llava_next":
            images = LlavaNextImageProcessorPil(
                size=size, crop_size=crop, image_grid_pinpoints=self.config().image_grid_pinpoints
            )
            return LlavaNextProcessor(images, tokenizer, num_additional_image_tokens=1, **common)
        return LlavaProcessor(
            CLIPImageProcessorPil(size=size, crop_size=crop), tokenizer, num_additional_image_tokens=1, **common
        )


STYLES: dict[str, dict[str, Any]] = {
    "hub, one file": {"legacy": True},
    "hub, shards": {"legacy": True, "max_shard_size": "20KB"},
    "memory, one file": {"legacy": False},
    "memory, shards": {"legacy": False, "max_shard_size": "20KB"},
}
FAMILIES = ("llava", "llava_next", "vipllava")
TEXTS = ("llama", "mistral", "qwen2")


def random_basis(rank: int, width: int, seed: int = 0) -> torch.Tensor:
    """[rank, width] with orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, rank, generator=generator)).Q.T.contiguous()


def variations() -> list[Tiny]:
    """One model per family and text model, the other properties drawn so that each takes both values often."""
    draw = random.Random(0)
    cells = [Tiny(family=family, text=text) for family in FAMILIES for text in TEXTS]
    return [
        replace(
            cell,
            tied=draw.random() < 0.5,
            bias=draw.random() < 0.5,
            projector_bias=draw.random() < 0.7,
            kv_heads=draw.choice([1, 2, 4]),
            width=draw.choice([32, 48]),
            seed=index,
        )
        for index, cell in enumerate(cells)
    ]


def corners() -> list[Tiny]:
    """What variations() draws too seldom: multi-query attention, every bias at once, tied heads, no projector bias."""
    return [
        Tiny("llava", "llama", kv_heads=1, tied=True, bias=True, seed=21),
        Tiny("llava_next", "llama", kv_heads=4, bias=True, projector_bias=False, seed=22),
        Tiny("vipllava", "llama", kv_heads=1, tied=True, bias=True, projector_bias=True, seed=23),
    ]


def name_of(tiny: Tiny) -> str:
    """A test's name for a model."""
    flags = "tied" * tiny.tied, "biased" * tiny.bias, "flat" * (not tiny.projector_bias)
    return "-".join(part for part in (tiny.family, tiny.text, f"kv{tiny.kv_heads}", *flags) if part)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a saved model by its name on disk."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrites a single-file checkpoint after `change` has changed the dictionary of its tensors."""
    held = tensors(folder)
    change(held)
    save_file({name: each.contiguous() for name, each in held.items()}, folder / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    """The JSON object at `path` with `values`, those of an inner object into it."""
    table = json.loads(path.read_text())
    for key, value in values.items():
        table[key] = {**(table.get(key) or {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(table))


def save(config: Any, folder: Path) -> Path:
    """A model of `config` with whatever weights it starts with."""
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder


def flip(path: Path, at: int = -1) -> None:
    """Another lowest bit in one byte of the file, the last unless said."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
