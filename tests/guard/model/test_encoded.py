"""Prompts are encoded once for processors that are made of the same files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from zoo import change_json

from guardfold.guard.model import processor
from guardfold.guard.model.processor import PicturedQuestion, encoded
from guardfold.guard.model.vlm import load_processor

RED, BLUE = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
ASKED = [("how to walk ?", RED), ("how to bake bread ?", RED)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[PicturedQuestion]]:
    """What is encoded and not remembered; nothing is when the test begins."""
    made: list[Sequence[PicturedQuestion]] = []
    encode = processor._encoded

    def listed(taking: Any, asked: Sequence[PicturedQuestion], where: Path) -> BatchFeature:
        made.append(asked)
        return encode(taking, asked, where)

    monkeypatch.setattr(processor, "_encoded", listed)
    monkeypatch.setattr(processor, "_remembered", {})
    return made


def test_the_same_is_encoded_once_and_anything_else_anew(
    model: Path, tmp_path: Path, made: list[Sequence[PicturedQuestion]]
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    one, other = load_processor(model), load_processor(copy)
    first = encoded(one, ASKED, model)
    first["more"] = None
    again = encoded(other, ASKED, copy)
    assert len(made) == 1 and again.keys() == first.keys() - {"more"}
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    for asked in ([ASKED[0]], ASKED[::-1], [(text, BLUE) for text, _ in ASKED], [(text, None) for text, _ in ASKED]):
        before = len(made)
        batch = encoded(one, asked, model)
        assert len(made) == before + 1 and batch.keys() <= again.keys()
        assert any(name not in batch or not torch.equal(value, batch[name]) for name, value in again.items())
    change_json(copy / "processor_config.json", image_processor={"rescale_factor": 0.5})
    changed = encoded(load_processor(copy), ASKED, copy)
    assert not torch.equal(changed["pixel_values"], again["pixel_values"])


def test_no_more_is_kept_than_there_is_room_for(
    model: Path, made: list[Sequence[PicturedQuestion]], monkeypatch: pytest.MonkeyPatch
) -> None:
    taking = load_processor(model)
    size = sum(value.nbytes for value in encoded(taking, ASKED, model).values())
    monkeypatch.setattr(processor, "REMEMBERED_BYTES", size)
    for _ in range(2):
        encoded(taking, ASKED[:1], model)
        encoded(taking, ASKED, model)
    assert made == [ASKED, ASKED[:1], ASKED[:1]]


def test_what_was_encoded_without_gradients_serves_where_they_are_wanted(model: Path, made: list[Any]) -> None:
    taking = load_processor(model)
    with torch.inference_mode():
        encoded(taking, ASKED, model)
    again = encoded(taking, ASKED, model)
    assert len(made) == 1 and not any(value.is_inference() for value in again.values())
