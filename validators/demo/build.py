"""The demo's vessel: tokenizer, processor and an untrained model, all ordinary transformers objects."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .world import words

__all__ = ["PIXELS", "TOKENS_PER_IMAGE", "new_model", "new_processor", "sentencepiece_model"]

PIXELS, PATCH = 24, 8
TOKENS_PER_IMAGE = (PIXELS // PATCH) ** 2
"""Tokens per picture: one per patch, CLS dropped."""

SPECIAL: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IMAGE = "<image>"
USER, ASSISTANT = "user:", "assistant:"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first %} {% endif -%}
    {{- 'USER' if message['role'] == 'user' else 'ASSISTANT' -}}
    {%- if message['content'] is string -%}
        {{- ' ' + message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- ' ' + part['text'] -}}{%- endfor -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} ASSISTANT{% endif -%}
""".replace("USER", USER).replace("ASSISTANT", ASSISTANT)
"""`user:<image> question assistant: answer</s>`: pictures before the words, wherever the message lists them."""


def sentencepiece_model() -> bytes:
    """Returns a SentencePiece BPE model (serialised ModelProto) in which every word of the world is one piece.

    Pieces: <unk> <s> </s>, 256 bytes, <image> <pad>, the prefixes of every word, single characters. Only prefixes can
    merge, so a word has exactly one derivation, and any reader of the file arrives at the same pieces.
    """
    protocol: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

    kinds = protocol.ModelProto.SentencePiece
    spoken = ["▁" + word for word in (USER, ASSISTANT, *words())]
    prefixes = dict.fromkeys(word[:end] for word in spoken for end in range(2, len(word) + 1))
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(IMAGE, kinds.USER_DEFINED), ("<pad>", kinds.USER_DEFINED)]
    first_scored = len(pieces)
    pieces += [(piece, kinds.NORMAL) for piece in (*prefixes, *sorted({*"".join(spoken)}))]

    proto = protocol.ModelProto()
    for index, (piece, kind) in enumerate(pieces):
        score = float(first_scored - index) if kind == kinds.NORMAL else 0.0
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = protocol.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.user_defined_symbols.extend([IMAGE, "<pad>"])
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()


def new_processor(folder: Path) -> LlavaProcessor:
    """Write the tokenizer and processor files into `folder` and return the processor they describe."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = LlamaTokenizer.from_pretrained(
        folder, add_bos_token=True, padding_side="left", extra_special_tokens={"image_token": IMAGE}, **SPECIAL
    )
    edge = {"height": PIXELS, "width": PIXELS}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=edge),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return processor


def new_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Returns an untrained model for `processor`, drawn from torch's global generator."""
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=64,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=processor.image_token_id,
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=24, **special)
    return model
