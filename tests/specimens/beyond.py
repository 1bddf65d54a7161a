"""Tiny models of the families the writers' table does not name; which image-to-text classes are left out, and why."""

from __future__ import annotations

from specimens import Specimen
from specimens.beyond_fifth import FIFTH
from specimens.beyond_first import FIRST
from specimens.beyond_fourth import FOURTH
from specimens.beyond_second import SECOND
from specimens.beyond_sixth import SIXTH
from specimens.beyond_third import THIRD

BEYOND: list[Specimen] = [*FIRST, *SECOND, *THIRD, *FOURTH, *FIFTH, *SIXTH]

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
