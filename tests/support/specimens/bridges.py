"""Other bridges from picture to text: queries, aligners, a table of visual words, bare patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoConfig

from specimens import Inputs, Knobs, Specimen
from specimens.parts import GRID, IMAGE, PAD, PATCH, SIDE, VOCAB, batch, language, noise, pictures, text, vision, words

QUERIES = 3
INDICATORS = [7, 8, 9, 10, 11]
VISUAL_WORDS = 20


def queries(kind: str, inner: str, knobs: Knobs) -> Any:
    """The Q-Former looks at the picture in the first of its two layers."""
    former: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 20, "intermediate_size": 24, "pad_token_id": PAD}
    former |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
    tower = {"blip-2": "blip_2_vision_model", "instructblip": "instructblip_vision_model"}[kind]
    return AutoConfig.for_model(
        kind,
        text_config=language(inner, knobs),
        vision_config=vision(tower, qkv_bias=knobs.bias),
        qformer_config=former,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def deepseek(knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "deepseek_vl",
        text_config=language("llama", knobs),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def janus(knobs: Knobs) -> Any:
    """An aligner of three layers; the parts that draw pictures as small as can be."""
    tower = {"mlp_ratio": 1.5, "projection_dim": knobs.width, "depth": 3, "num_image_tokens": GRID**2}
    drawing: dict[str, Any] = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "num_res_blocks": 1,
    }
    drawing |= {"channel_multiplier": [1, 1], "projection_dim": knobs.width, "image_token_embed_dim": knobs.width}
    seen = vision("janus_vision_model", attention_bias=knobs.bias, **tower)
    del seen["intermediate_size"]
    return AutoConfig.for_model(
        "janus",
        text_config=language("llama", knobs),
        vision_config=seen,
        vq_config=drawing,
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def ovis2(knobs: Knobs) -> Any:
    tower = {"vocab_size": VISUAL_WORDS + len(INDICATORS), "hidden_stride": 2, "num_visual_indicator_tokens": 5}
    return AutoConfig.for_model(
        "ovis2",
        text_config=language("qwen2", knobs),
        vision_config=vision("ovis2_vision", qkv_bias=knobs.bias, mlp_bias=knobs.bias, **tower),
        image_token_id=IMAGE,
        visual_indicator_token_ids=INDICATORS,
        vocab_size=VOCAB,
        hidden_size=knobs.width,
        tie_word_embeddings=knobs.tied,
    )


def fuyu(knobs: Knobs) -> Any:
    inner = language("persimmon", knobs)
    del inner["num_key_value_heads"]
    return AutoConfig.for_model(
        "fuyu",
        text_config=inner,
        image_size=SIDE,
        patch_size=PATCH,
        image_token_id=IMAGE,
        tie_word_embeddings=knobs.tied,
    )


def square(config: Any, count: int) -> dict[str, Inputs]:
    """Pictures of one size, `count` tokens each."""
    return {
        "text": text(),
        "image": pictures(count) | {"pixel_values": noise(1, 3, SIDE, SIDE)},
        "images": pictures(*[count] * 3) | {"pixel_values": noise(3, 3, SIDE, SIDE, seed=1)},
    }


def always_seen(config: Any) -> dict[str, Inputs]:
    """The class wants a picture even where no token stands for it; InstructBLIP reads the question next to each."""
    made = square(config, QUERIES)
    made["text"]["pixel_values"] = noise(2, 3, SIDE, SIDE, seed=2)
    if config.model_type == "instructblip":
        for inputs in made.values():
            question = batch(*[words(4 - i, seed=i) for i in range(len(inputs["pixel_values"]))])
            inputs["qformer_input_ids"] = question["input_ids"]
            inputs["qformer_attention_mask"] = question["attention_mask"]
    return made


def indicated(config: Any) -> dict[str, Inputs]:
    """Each picture between two of the table's indicators."""
    made = square(config, (GRID // 2) ** 2)
    for inputs in made.values():
        ids = inputs["input_ids"]
        before, after = ids.roll(-1, dims=1) == IMAGE, ids.roll(1, dims=1) == IMAGE
        ids[before & (ids != IMAGE)] = INDICATORS[0]
        ids[after & (ids != IMAGE)] = INDICATORS[-1]
    return made


def patches(config: Any) -> dict[str, Inputs]:
    counts = [4, 6, 2]
    return {
        "text": text(),
        "image": pictures(6) | {"pixel_values": noise(1, 6, 3 * PATCH**2)},
        "images": pictures(*counts) | {"pixel_values": noise(1, sum(counts), 3 * PATCH**2, seed=1)},
    }


FAMILIES: list[tuple[str, Callable[[Knobs], Any], Callable[[Any], dict[str, Inputs]]]] = [
    ("blip-2", partial(queries, "blip-2", "opt"), always_seen),
    ("instructblip", partial(queries, "instructblip", "llama"), always_seen),
    ("deepseek_vl", deepseek, partial(square, count=GRID**2)),
    ("janus", janus, partial(square, count=GRID**2)),
    ("ovis2", ovis2, indicated),
    ("fuyu", fuyu, patches),
]
BRIDGES = [Specimen(name, config, inputs) for name, config, inputs in FAMILIES]
