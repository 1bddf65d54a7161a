"""What the model card says was measured."""

from __future__ import annotations

from pathlib import Path

from ..evidence import EVIDENCE
from ..evidence.piece import JSON, Picture


def markdown(figures: JSON) -> str:
    """Says Evidence.figures() as a card does: soundness and the verdict's reasons, then the sections of the pieces."""
    heads = (paragraph for piece in EVIDENCE.values() for paragraph in piece.card_head(figures))
    sections = (paragraph for piece in EVIDENCE.values() for paragraph in piece.card(figures))
    return "\n\n".join([*heads, *sections])


def pictures() -> dict[str, Picture]:
    """Lists what a card may show, by file name."""
    return {name: picture for piece in EVIDENCE.values() for name, picture in piece.pictures.items()}


def draw_pictures(folder: Path, figures: JSON) -> dict[str, str]:
    """Draws what a card of these figures shows into `folder`: file name -> caption."""
    captions = {}
    for name, picture in pictures().items():
        if drawn := picture.drawn(figures):
            (folder / name).write_bytes(drawn)
            captions[name] = picture.caption
    return captions
