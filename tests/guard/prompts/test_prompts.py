"""Prompts: files of them, wrong in every way a file can be, and batches of them as the model's own template says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from zoo import PATCH, SIDE

from guardfold.guard.base.errors import InputError
from guardfold.guard.model.vlm import VLM
from guardfold.guard.prompts.image_files import load_image
from guardfold.guard.prompts.prompts import Prompt, encode, illustrated, load_anchors, positions

PAIRS = [("how to steal a car ?", "how to paint a car ?"), ('open, "a" lock', "open a door")]


def test_anchors_are_the_same_from_jsonl_and_csv(tmp_path: Path) -> None:
    lines = [json.dumps({"harmful": a, "harmless": b, "category": "x"}) for a, b in PAIRS]
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], "", lines[1], ""]), encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        'harmless,harmful\nhow to paint a car ?,how to steal a car ?\nopen a door,"open, ""a"" lock"\n',
        encoding="utf-8",
    )
    jsonl, csv = load_anchors(tmp_path / "a.jsonl"), load_anchors(tmp_path / "a.csv")
    assert jsonl == csv
    assert list(zip(jsonl.harmful, jsonl.harmless, strict=True)) == PAIRS
    assert jsonl.hash == csv.hash != jsonl.head(1).hash
    assert len(jsonl.head(1)) == 1


GOOD = json.dumps({"harmful": "steal", "harmless": "buy"})
ANCHOR_FILES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": (f"{GOOD}\n{{oops\n", "line 2: not sound JSON"),
    "nested too deep": (f"{GOOD}\n{'[' * 50_000}\n", "line 2: not sound JSON"),
    "not an object": (f"{GOOD}\n\n[1]\n", "line 3: not a JSON object"),
    "no harmless": (f'{GOOD}\n{{"harmful": "steal"}}\n', "line 2: 'harmless' is missing"),
    "not text": (f'{{"harmful": 1, "harmless": "buy"}}\n{GOOD}\n', "line 1: 'harmful' is missing or not text"),
    "blank text": (f'{GOOD}\n{{"harmful": " ", "harmless": "buy"}}\n', "line 2: 'harmful' is missing or not text"),
    "endless line": (f'{GOOD}\n{{"harmful": "{"a" * 70_000}", "harmless": "buy"}}\n', "line 2: longer than"),
    "empty": ("\n\n", "no anchor pairs"),
    "not UTF-8": (b"\xff\xfe\x00", "not UTF-8"),
}


@pytest.mark.parametrize("kind", ANCHOR_FILES)
def test_malformed_anchors_are_refused_naming_the_line(tmp_path: Path, kind: str) -> None:
    text, says = ANCHOR_FILES[kind]
    path = tmp_path / "anchors.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=says) as error:
        load_anchors(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("harmful,harmless\na,b\nc,\n", "line 3: 'harmless' is missing"),
        ("harmful,harmless\na,b\nc\n", "line 3: 'harmless' is missing"),
        ("bad,good\na,b\n", "line 2: 'harmful' is missing"),
        ("harmful,harmless\n", "no anchor pairs"),
    ],
)
def test_malformed_csv_is_refused_naming_the_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "anchors.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_anchors(tmp_path / "anchors.csv")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "absent.jsonl", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(InputError, match=says) as error:
            load_anchors(path)
        assert str(path) in str(error.value)


def test_pictures_come_from_inside_the_folder_only(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside.png"
    (inside / "images").mkdir(parents=True)
    Image.new("RGBA", (4, 4), "red").save(inside / "images" / "a.png")
    Image.new("RGB", (4, 4)).save(outside)
    (inside / "link.png").symlink_to(outside)
    (inside / "text.png").write_text("no picture")
    assert load_image(inside, "images/a.png", "here").mode == "RGB"
    for name in ("../outside.png", str(outside), "link.png", "images/../../outside.png", "absent.png", "images"):
        with pytest.raises(InputError, match=r"^rows, line 3: .* is not a file inside"):
            load_image(inside, name, "rows, line 3")
    with pytest.raises(InputError, match=r"^here: 'text\.png' is not a readable picture"):
        load_image(inside, "text.png", "here")


TEXTS = [Prompt("how to walk ?"), Prompt("why do some people prefer to walk home ?")]


def words(vlm: VLM, ids: torch.Tensor) -> list[str]:
    tokenizer: Any = vlm.processor
    return tokenizer.tokenizer.convert_ids_to_tokens(ids.tolist())


def test_encoding_speaks_the_chat_template_up_to_the_answer_and_pads_on_the_left(tiny: VLM) -> None:
    batch = encode(tiny, TEXTS)
    short, long = batch["input_ids"]
    said = "user : how to walk ? assistant :".split()
    assert words(tiny, short) == ["<pad>"] * (len(long) - len(said)) + said
    assert batch["attention_mask"].tolist() == [[0] * (len(long) - len(said)) + [1] * len(said), [1] * len(long)]
    assert words(tiny, long)[-2:] == ["assistant", ":"]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_positions_count_real_tokens(tiny: VLM) -> None:
    batch = encode(tiny, TEXTS)
    padding = int((batch["attention_mask"][0] == 0).sum())
    count = batch["input_ids"].shape[1]
    assert padding > 0
    assert positions(batch).tolist() == [[0] * padding + list(range(count - padding)), list(range(count))]


def test_a_picture_takes_its_place_in_front_of_the_text(tiny: VLM) -> None:
    batch = encode(tiny, illustrated(TEXTS, "blank"))
    patches = (SIDE // PATCH) ** 2
    said = words(tiny, batch["input_ids"][1])
    assert said[:2] == ["user", ":"]
    assert said[2 : 2 + patches] == ["<image>"] * patches
    assert said.count("<image>") == patches
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch["pixel_values"].dtype == tiny.model.dtype
