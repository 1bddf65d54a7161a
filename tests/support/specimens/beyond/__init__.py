"""Tiny models of the families the writers' table does not name; which image-to-text classes are left out, and why."""

from __future__ import annotations

from specimens import Specimen
from specimens.beyond.cohere import COHERE
from specimens.beyond.cosmos import COSMOS
from specimens.beyond.deepseek import DEEPSEEK
from specimens.beyond.dots import DOTS
from specimens.beyond.ernie import ERNIE
from specimens.beyond.exaone import EXAONE
from specimens.beyond.gemma import GEMMA
from specimens.beyond.glm import GLM
from specimens.beyond.granite import GRANITE
from specimens.beyond.hunyuan import HUNYUAN
from specimens.beyond.hyperclovax import HYPERCLOVAX
from specimens.beyond.inkling import INKLING
from specimens.beyond.instructblip import INSTRUCTBLIP
from specimens.beyond.kimi import KIMI
from specimens.beyond.kosmos import KOSMOS
from specimens.beyond.lfm import LFM
from specimens.beyond.minicpm import MINICPM
from specimens.beyond.minimax import MINIMAX
from specimens.beyond.mistral import MISTRAL
from specimens.beyond.muse import MUSE
from specimens.beyond.nemotron import NEMOTRON
from specimens.beyond.ocr import OCR
from specimens.beyond.picture_codes import PICTURE_CODES
from specimens.beyond.qwen import QWEN
from specimens.beyond.step import STEP
from specimens.beyond.timm_towers import TIMM_TOWERS
from specimens.beyond.video_llama import VIDEO_LLAMA

BEYOND: list[Specimen] = [
    *COHERE,
    *COSMOS,
    *DEEPSEEK,
    *DOTS,
    *ERNIE,
    *EXAONE,
    *GEMMA,
    *GLM,
    *GRANITE,
    *HUNYUAN,
    *HYPERCLOVAX,
    *INKLING,
    *INSTRUCTBLIP,
    *KIMI,
    *KOSMOS,
    *LFM,
    *MINICPM,
    *MINIMAX,
    *MISTRAL,
    *MUSE,
    *NEMOTRON,
    *OCR,
    *PICTURE_CODES,
    *QWEN,
    *STEP,
    *TIMM_TOWERS,
    *VIDEO_LLAMA,
]

NOT_DECODERS: dict[str, str] = {
    "blip": "the text model cross-attends to the picture from a BERT-like decoder; nothing enters the embeddings",
    "florence2": "encoder and decoder (BART)",
    "git": "a BERT-like post-norm text model with an MLM-style head over picture and text",
    "pi0": "puts out robot actions, not text",
    "pix2struct": "encoder and decoder (T5)",
    "pp_formulanet": "encoder and decoder (mBART)",
    "t5gemma2": "encoder and decoder (Gemma 3 in both)",
    "udop": "encoder and decoder (T5)",
    "vision-encoder-decoder": "any vision encoder with any cross-attending decoder",
}

UNBUILDABLE_BEYOND: dict[str, str] = {
    "evolla": "the auto class does not recognise its config in this release; it reads proteins, not pictures",
}
