"""A tiny random model of every family that has an alias, with a processor of its real class, set as it is published.

The models are the specimens', with a vocabulary of bytes behind their special words; what a setting counts (patches,
tokens a picture) is scaled to their towers, everything else is as on the models' pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from specimens import Knobs, Specimen, build
from specimens.beyond.lfm import LFM
from specimens.known import KNOWN
from specimens.llava_kind import ANYRES, FULL, PINPOINTS, SIGLIP, llava
from specimens.mixture import QUERIES
from specimens.parts import BOS, EOS, FIRST_WORD, GRID, IMAGE, PAD, PATCH, SIDE, language, vision
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

SQUARE = {"height": SIDE, "width": SIDE}
CLIP_SIZE: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
ARIA_SIDE = 980
PIXELS = {"min_pixels": 4 * (2 * PATCH) ** 2, "max_pixels": 16 * (2 * PATCH) ** 2}


@dataclass(frozen=True)
class Real:
    """One family.

    specimen: of its model.  words: special words in the order of their ids, from IMAGE on, a place left empty where the
    specimen has none.  processor: from a tokenizer.  template: None where none is published.  vision: whether loading
    the processor needs guardfold[vision].
    """

    specimen: Specimen
    words: tuple[str, ...]
    processor: Callable[[Any], Any]
    template: str | None
    named: Mapping[str, str] = field(default_factory=dict)
    vision: bool = False
    spaced: bool = False
    """Whether its tokenizer puts a space before every text, and `words` are no special ones to it."""

    def tokenizer(self) -> Any:
        """Words of one byte each, behind the special ones; `named` are those that the tokenizer has a name for."""
        special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", **dict(enumerate(self.words, IMAGE))}
        held = {name: i for i, name in special.items() if name}
        held |= {f"<unused{i}>": i for i in range(FIRST_WORD) if i not in held.values()}
        held |= {byte: FIRST_WORD + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        core = Tokenizer(models.BPE(held, [], ignore_merges=True))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if self.spaced:
            apart = pre_tokenizers.Split(Regex("|".join(re.escape(word) for word in self.words)), "isolated")
            whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            core.normalizer, core.pre_tokenizer = normalizers.Prepend(" "), pre_tokenizers.Sequence([apart, whole])
        else:
            core.add_special_tokens([AddedToken(word, normalized=False) for word in special.values() if word])
        ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=dict(self.named), **ends)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, **knobs: Any) -> Path:
        """Writes model and processor, names on disk as the hub has them."""
        made = Specimen(self.specimen.name, lambda given: spelled(self.specimen.config(given)), self.specimen.inputs)
        model = build(made, Knobs(**knobs), dtype=dtype)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
        model.save_pretrained(folder, save_original_format=True)
        processor = self.processor(self.tokenizer())
        processor.chat_template = self.template
        processor.save_pretrained(folder)
        return folder


def spelled(config: Any) -> Any:
    """`config` with words for every byte, and positions for texts that are spelled."""
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = FIRST_WORD + 256, 1024
    parts: tuple[Any, Any] = (config, getattr(config, "qformer_config", None))
    for part in parts:
        if hasattr(part, "vocab_size"):
            part.vocab_size = text.vocab_size
        if hasattr(part, "max_position_embeddings"):
            part.max_position_embeddings = text.max_position_embeddings
    return config


def class_of(name: str, module: str | None = None) -> Any:
    """A class of transformers by name; of one of its models' modules, where it does not export it."""
    return getattr(import_module(f"transformers.models.{module}") if module else transformers, name)


def pil(model: str, name: str) -> Any:
    """The image processor of `model` that needs Pillow alone."""
    return class_of(f"{name}ImageProcessorPil", f"{model}.image_processing_pil_{model}")


def made(name: str, images: Callable[[], Any], tokenizer: Any, *, video: str = "", **settings: Any) -> Any:
    """A processor by its class's name, its parts given by name."""
    parts = {"image_processor": images(), "tokenizer": tokenizer}
    if video:
        parts["video_processor"] = class_of(f"{video}VideoProcessor")()
    return class_of(f"{name}Processor")(**parts, **settings)


def template(image: str, before: str = "", after: str = "", answer: str = "", between: str = "") -> str:
    """A chat template: what stands before and after each turn, for a picture, and before an answer."""
    part = "{% if part.type == 'image' %}" + image + between + "{% else %}{{ part.text }}{% endif %}"
    turn = before + "{% for part in message.content %}" + part + "{% endfor %}" + after
    return (
        "{% for message in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}" + answer + "{% endif %}"
    )


def chatml(image: str) -> str:
    return template(image, "<|im_start|>{{ message.role }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")


BY_NAME = {each.name: each for each in (*KNOWN, *LFM)}


def granite(knobs: Knobs) -> Any:
    """Granite Vision: SigLIP's whole output, of several layers."""
    return llava("llava_next", "granite", SIGLIP, FULL | ANYRES | {"vision_feature_layer": [-1, -2]}, knobs)


def pixtral(knobs: Knobs) -> Any:
    return AutoConfig.for_model(
        "llava",
        text_config=language("mistral", knobs),
        vision_config=vision("pixtral", head_dim=8) | {"image_size": 2 * SIDE},
        image_token_index=IMAGE,
        multimodal_projector_bias=knobs.bias,
        tie_word_embeddings=knobs.tied,
        **FULL,
    )


def aria(knobs: Knobs) -> Any:
    """Its class resizes every picture to 980 pixels, whatever its image processor says."""
    config = BY_NAME["aria"].config(knobs)
    config.vision_config.image_size, config.vision_config.patch_size = ARIA_SIDE, ARIA_SIDE // GRID
    return config


def lfm2(knobs: Knobs) -> Any:
    config = BY_NAME["lfm2_vl"].config(knobs)
    config.image_token_id = IMAGE
    return config


def qwen(name: str, tokenizer: Any) -> Any:
    images = partial(pil("qwen2_vl", "Qwen2VL"), patch_size=PATCH, merge_size=2, temporal_patch_size=2, **PIXELS)
    return made(name, images, tokenizer, video="Qwen3VL" if name.startswith("Qwen3") else "Qwen2VL")


def idefics(kind: str, tokenizer: Any) -> Any:
    images = partial(pil(kind.lower(), kind), size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    video = "SmolVLM" if kind == "SmolVLM" else ""
    return made(kind, images, tokenizer, image_seq_len=GRID, video=video)


def queried(kind: str, tokenizer: Any) -> Any:
    """The Q-Former of InstructBLIP has a tokenizer of its own."""
    own = {"qformer_tokenizer": Real.tokenizer(REAL["instructblip"])} if kind == "InstructBlip" else {}
    return made(kind, partial(pil("blip", "Blip"), size=SQUARE), tokenizer, num_query_tokens=3, **own)


def paligemma(tokenizer: Any) -> Any:
    images = pil("siglip", "Siglip")(size=SQUARE)
    images.image_seq_length = GRID**2
    return made("PaliGemma", lambda: images, tokenizer)


VISION_WORDS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
IDEFICS_WORDS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
VICUNA = template("<image>", "USER: ", " ", "ASSISTANT:", between="\n")
MISTRAL = template("<image>", "[INST] ", " [/INST]", between="\n")
IDEFICS = template("<image>", "User:", "<end_of_utterance>\n", "Assistant:")
PATCHES: dict[str, Any] = {"patch_size": PATCH, "num_additional_image_tokens": 1}
DEFAULT = PATCHES | {"vision_feature_select_strategy": "default"}
SMOL = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
TILES = partial(pil("got_ocr2", "GotOcr2"), size=SQUARE, crop_to_patches=True, max_patches=4)
"""InternVL and Aya cut pictures into tiles with the same class."""

QWEN = [
    ("qwen2-vl", "qwen2_vl", "Qwen2VL"),
    ("qwen2.5-vl", "qwen2_5_vl", "Qwen2_5_VL"),
    ("qwen3-vl", "qwen3_vl", "Qwen3VL"),
]
REAL: dict[str, Real] = {
    "llava": Real(
        BY_NAME["llava+llama"],
        ("<image>",),
        partial(made, "Llava", partial(pil("clip", "CLIP"), **CLIP_SIZE), **DEFAULT),
        VICUNA,
    ),
    "llava-next": Real(
        BY_NAME["llava_next+mistral"],
        ("<image>",),
        partial(
            made,
            "LlavaNext",
            partial(pil("llava_next", "LlavaNext"), image_grid_pinpoints=PINPOINTS, **CLIP_SIZE),
            **DEFAULT,
        ),
        MISTRAL,
    ),
    "llava-onevision": Real(
        BY_NAME["llava_onevision"],
        ("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        partial(
            made,
            "LlavaOnevision",
            partial(pil("llava_onevision", "LlavaOnevision"), size=SQUARE, image_grid_pinpoints=PINPOINTS),
            video="LlavaOnevision",
            num_image_tokens=GRID**2,
            vision_feature_select_strategy="full",
        ),
        chatml("<image>"),
        vision=True,
    ),
    "vip-llava": Real(
        BY_NAME["vipllava"],
        ("<image>",),
        partial(made, "Llava", partial(pil("clip", "CLIP"), **CLIP_SIZE), **DEFAULT),
        template("<image>", "###Human: ", "", "###Assistant:", between="\n"),
    ),
    "video-llava": Real(
        BY_NAME["video_llava"],
        ("<image>", "<video>"),
        partial(
            made,
            "VideoLlava",
            partial(class_of("VideoLlavaImageProcessor"), **CLIP_SIZE),
            video="VideoLlava",
            **DEFAULT,
        ),
        VICUNA,
        vision=True,
    ),
    **{
        alias: Real(
            BY_NAME[specimen],
            VISION_WORDS,
            partial(qwen, name),
            chatml("<|vision_start|><|image_pad|><|vision_end|>"),
            vision=True,
        )
        for alias, specimen, name in QWEN
    },
    "internvl": Real(
        BY_NAME["internvl+qwen2"],
        ("<IMG_CONTEXT>", "<video>", "<img>", "</img>", "<|im_start|>", "<|im_end|>"),
        partial(made, "InternVL", TILES, video="InternVL", image_seq_length=GRID),
        chatml("<IMG_CONTEXT>\n"),
        {
            **{"start_image_token": "<img>", "end_image_token": "</img>"},
            **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        },
        vision=True,
    ),
    "idefics2": Real(
        BY_NAME["idefics2"],
        IDEFICS_WORDS,
        partial(
            made,
            "Idefics2",
            partial(
                pil("idefics2", "Idefics2"),
                size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE},
                do_image_splitting=True,
            ),
            image_seq_len=3,
        ),
        IDEFICS,
    ),
    "idefics3": Real(BY_NAME["idefics3"], IDEFICS_WORDS, partial(idefics, "Idefics3"), IDEFICS),
    "smolvlm": Real(BY_NAME["smolvlm"], IDEFICS_WORDS, partial(idefics, "SmolVLM"), IDEFICS, SMOL, vision=True),
    "paligemma": Real(BY_NAME["paligemma+gemma"], ("<image>",), paligemma, None, {"image_token": "<image>"}),
    "paligemma2": Real(BY_NAME["paligemma+gemma2"], ("<image>",), paligemma, None, {"image_token": "<image>"}),
    "gemma3": Real(
        BY_NAME["gemma3"],
        ("<image_soft_token>", "", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
        partial(
            made,
            "Gemma3",
            partial(pil("gemma3", "Gemma3"), size=SQUARE, image_seq_length=GRID),
            image_seq_length=GRID,
        ),
        template(
            "<start_of_image>",
            "<s><start_of_turn>{{ message.role }}\n",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        {
            **{"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
            **{"image_token": "<image_soft_token>"},
        },
    ),
    "pixtral": Real(
        Specimen("pixtral", pixtral, BY_NAME["mistral3"].inputs),
        ("[IMG]", "", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        partial(
            made,
            "Pixtral",
            partial(
                pil("pixtral", "Pixtral"),
                size={"longest_edge": 2 * SIDE},
                patch_size={"height": PATCH, "width": PATCH},
            ),
            patch_size=PATCH,
        ),
        template("[IMG]", "<s>[INST]", "[/INST]"),
        vision=True,
    ),
    "mistral-small": Real(
        BY_NAME["mistral3"],
        ("[IMG]", "", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"),
        partial(
            made,
            "Pixtral",
            partial(
                pil("pixtral", "Pixtral"),
                size={"longest_edge": 2 * SIDE},
                patch_size={"height": PATCH, "width": PATCH},
            ),
            patch_size=PATCH,
            spatial_merge_size=2,
        ),
        template("[IMG]", "<s>[INST]", "[/INST]"),
        vision=True,
    ),
    "llama-vision": Real(
        BY_NAME["mllama"],
        ("<|image|>", "<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        partial(made, "Mllama", partial(pil("mllama", "Mllama"), size=SQUARE, max_image_tiles=2)),
        template(
            "<|image|>",
            "<s><|start_header_id|>{{ message.role }}<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
    "llama4": Real(
        BY_NAME["llama4"],
        (
            *("<|patch|>", "<|image|>", "<|image_start|>", "<|image_end|>"),
            *("<|tile_x_separator|>", "<|tile_y_separator|>", "<|header_start|>", "<|header_end|>", "<|eot|>"),
        ),
        partial(
            made,
            "Llama4",
            lambda: class_of("Llama4ImageProcessor")(size=SQUARE, max_patches=4),
            patch_size=PATCH,
            pixel_shuffle_ratio=0.5,
        ),
        template(
            "<|image|>",
            "<s><|header_start|>{{ message.role }}<|header_end|>\n\n",
            "<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
        ),
        vision=True,
    ),
    "aya-vision": Real(
        BY_NAME["aya_vision"],
        (
            *("<|IMG_PATCH|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"),
            *("TILE", "TILE_GLOBAL", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
            "<|CHATBOT_TOKEN|>",
        ),
        partial(made, "AyaVision", TILES, patch_size=PATCH, img_size=SIDE, downsample_factor=2),
        template(
            "<image>",
            "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ),
    ),
    "aria": Real(
        Specimen("aria", aria, BY_NAME["aria"].inputs),
        ("<|img|>", "<|im_start|>", "<|im_end|>"),
        partial(
            made,
            "Aria",
            pil("aria", "Aria"),
            size_conversion={490: QUERIES[6 * GRID], ARIA_SIDE: QUERIES[GRID**2]},
        ),
        chatml("<fim_prefix><|img|><fim_suffix>"),
        {"image_token": "<|img|>"},
    ),
    "granite-vision": Real(
        Specimen("granite-vision", granite, BY_NAME["llava_next+granite"].inputs),
        ("<image>", "<|user|>", "<|assistant|>"),
        partial(
            made,
            "LlavaNext",
            partial(pil("llava_next", "LlavaNext"), image_grid_pinpoints=PINPOINTS, **CLIP_SIZE),
            patch_size=PATCH,
            vision_feature_select_strategy="full",
        ),
        template("<image>", "<|user|>\n", "\n", "<|assistant|>\n", between="\n"),
    ),
    "lfm2-vl": Real(
        Specimen("lfm2-vl", lfm2, BY_NAME["lfm2_vl"].inputs),
        ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|im_start|>", "<|im_end|>"),
        partial(
            made,
            "Lfm2Vl",
            lambda: class_of("Lfm2VlImageProcessor")(
                encoder_patch_size=PATCH, tile_size=SIDE, max_tiles=2, min_image_tokens=1, max_image_tokens=4
            ),
        ),
        "{{ bos_token }}" + chatml("<image>"),
        {
            **{"image_token": "<image>", "image_start_token": "<|image_start|>"},
            **{"image_end_token": "<|image_end|>", "image_thumbnail": "<|img_thumbnail|>"},
        },
        vision=True,
    ),
    "glm-4.1v": Real(
        BY_NAME["glm4v"],
        ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|user|>", "<|assistant|>", "[gMASK]"),
        partial(
            made,
            "Glm4v",
            partial(
                pil("glm4v", "Glm4v"),
                patch_size=PATCH,
                size={"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": 32 * (2 * PATCH) ** 2},
            ),
            video="Glm4v",
        ),
        template(
            "<|begin_of_image|><|image|><|end_of_image|>",
            "[gMASK]<sop><|user|>\n",
            "",
            "<|assistant|>\n",
        ),
        vision=True,
    ),
    "blip2": Real(BY_NAME["blip-2"], ("<image>",), partial(queried, "Blip2"), None),
    "instructblip": Real(BY_NAME["instructblip"], ("<image>",), partial(queried, "InstructBlip"), None),
    "deepseek-vl": Real(
        BY_NAME["deepseek_vl"],
        ("<image_placeholder>",),
        partial(
            made,
            "DeepseekVL",
            partial(pil("deepseek_vl", "DeepseekVL"), size=SQUARE, min_size=PATCH),
            num_image_tokens=GRID**2,
        ),
        template("<image_placeholder>", "User: ", "\n\n", "Assistant:"),
        {"image_token": "<image_placeholder>"},
    ),
    "janus": Real(
        BY_NAME["janus"],
        ("<image_placeholder>", "<begin_of_image>", "<end_of_image>"),
        partial(
            made,
            "Janus",
            partial(pil("janus", "Janus"), size=SQUARE, min_size=PATCH),
            num_image_tokens=GRID**2,
        ),
        template("<image_placeholder>\n", "<|User|>: ", "\n\n", "<|Assistant|>:"),
        {
            **{"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>"},
            **{"eoi_token": "<end_of_image>"},
        },
    ),
    "ovis2": Real(
        BY_NAME["ovis2"],
        (
            "<IMG_ATOM>",
            "<|im_start|>",
            "<|im_end|>",
            "",
            *(f"<IMG_{each}>" for each in ("START", "GRID", "COL", "ROW", "END")),
        ),
        partial(
            made,
            "Ovis2",
            partial(pil("ovis2", "Ovis2"), size=SQUARE, crop_to_patches=True, max_patches=4),
            image_seq_length=GRID,
        ),
        chatml("<image>\n"),
    ),
    "fuyu": Real(
        BY_NAME["fuyu"],
        ("|SPEAKER|", "|NEWLINE|", "<0x04>", "<0x00>", "<0x01>", "<0x02>", "<0x03>"),
        partial(
            made,
            "Fuyu",
            lambda: pil("fuyu", "Fuyu")(
                size={"height": 2 * SIDE, "width": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH}
            ),
        ),
        None,
        vision=True,
        spaced=True,
    ),
}
"""Alias -> its family."""

ALIKE = {"llava-13b": "llava"}
"""Aliases of the same model in another size."""
