"""Files of prompts and pictures that others wrote: links, pipes, devices, absurd sizes, half characters."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deadline import within
from PIL import Image

from guardfold.guard.base.errors import InputError
from guardfold.guard.fitting import states, transcripts
from guardfold.guard.fitting.calibration import load_benign
from guardfold.guard.model.vlm import VLM, read_config
from guardfold.guard.prompts import image_files as pictures
from guardfold.guard.prompts import prompt_files as tables
from guardfold.guard.prompts import prompts
from guardfold.guard.prompts.image_files import load_image
from guardfold.guard.prompts.prompt_files import rows
from guardfold.guard.prompts.prompts import Prompt, beside, encode, illustrated, load_anchors
from guardfold.validators.behaviour import measure as behaviour
from guardfold.validators.behaviour.benchmarks import Pictured
from guardfold.validators.behaviour.evaluation_prompts import EvaluationPrompts, load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge

PROMPT_FILES = ["anchors.jsonl", "benign.jsonl", "probes.jsonl", "qa.jsonl", "demo.json"]
LONG = "a" * 300


def refused(step: Callable[[], Any], says: str) -> None:
    """`step` ends soon, with one line."""
    with within(20), pytest.raises(InputError, match=says) as error:
        step()
    assert "\n" not in str(error.value)


def write(path: Path, *table: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
    return path


def picture(path: Path, width: int = 4, height: int = 4, mode: str = "RGB") -> Path:
    Image.new(mode, (width, height)).save(path)
    return path


@pytest.mark.parametrize("name", PROMPT_FILES)
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_a_models_own_prompt_files_are_files_of_its_folder(
    tmp_path: Path, tiny_folder: Path, name: str, kind: str
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else write(tmp_path / "elsewhere", {}))
    says = rf"{name}: (leads outside the model folder|not a regular file)"
    refused(lambda: beside(folder, name), says)
    refused(lambda: read_config(folder), says)
    if name in ("probes.jsonl", "qa.jsonl", "demo.json"):
        refused(lambda: load_evaluation_prompts(folder), says)


def test_the_hubs_cache_keeps_prompts_and_pictures_as_links(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    for place in (blobs, folder / "images"):
        place.mkdir(parents=True)
    picture(tmp_path / "a.png").rename(blobs / "1")
    write(blobs / "2", {"image": "images/a.png", "text": "what ?", "answer": "red"})
    (folder / "images" / "a.png").symlink_to("../../../blobs/1")
    (folder / "qa.jsonl").symlink_to("../../blobs/2")
    (asked,) = load_evaluation_prompts(folder).qa
    assert asked.image is not None and asked.image.size == (4, 4)


def test_what_a_user_names_may_be_a_link_and_is_a_regular_file(tmp_path: Path) -> None:
    held = write(tmp_path / "held", {"harmful": "steal", "harmless": "buy"})
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "anchors.jsonl").symlink_to(held)
    assert load_anchors(tmp_path / "inner" / "anchors.jsonl").harmful == ("steal",)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / LONG, "cannot be read .File name too long"),
        (tmp_path / "\ud800", "no such file|not a name that a file can have"),
        (tmp_path / "a\0b", "not a name that a file can have"),
    ):
        refused(partial(load_anchors, path), says)
        refused(partial(load_evaluation_prompts, None, path), says)


@pytest.mark.parametrize("name", ["loop.png", f"{LONG}.png", "\ud800.png", "a\0b", "pipe.png"])
def test_a_picture_by_an_impossible_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    refused(lambda: load_image(tmp_path, name, "here"), "^here: .* is not a file inside")
    write(tmp_path / "qa.jsonl", {"image": name, "text": "what ?", "answer": "red"})
    refused(lambda: load_evaluation_prompts(tmp_path), r"qa\.jsonl, line 1: ")
    write(tmp_path / "benign.jsonl", {"image": name, "text": "what ?"})
    refused(lambda: load_benign(tmp_path / "benign.jsonl"), r"benign\.jsonl, line 1: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("how to \ud800 ?", r"not text \(surrogates not allowed\)"),
        ("a " * tables.MAX_TEXT, f"longer than {tables.MAX_TEXT} char"),
    ],
)
def test_texts_that_no_model_is_asked_are_refused(tmp_path: Path, text: str, says: str) -> None:
    picture(tmp_path / "a.png")
    where = "line 1: '(harmful|text)': "
    anchors = write(tmp_path / "a.jsonl", {"harmful": text, "harmless": "buy"})
    refused(lambda: load_anchors(anchors), where + says)
    write(tmp_path / "probes.jsonl", {"harmful": True, "text": text})
    refused(lambda: load_evaluation_prompts(tmp_path), where + says)
    qa = write(tmp_path / "q.jsonl", {"image": "a.png", "text": text, "answer": "red"})
    refused(lambda: load_evaluation_prompts(None, qa=qa), where + says)


@pytest.mark.parametrize("kind", [None, "blank"])
def test_the_word_that_stands_for_a_picture_is_no_part_of_a_text(tiny: VLM, kind: Any) -> None:
    asked = [Prompt("how to walk ?"), Prompt("how to <image> walk ?")]
    refused(lambda: encode(tiny, illustrated(asked, kind)), "^'how to <image> walk .*<image> stands for a picture")


@pytest.mark.parametrize("part", ["harmful", "benign", "qa", "questions", "pictured"])
def test_such_a_word_is_found_before_anything_is_asked(
    tiny: VLM, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (Pictured("how to <image> walk ?", tmp_path / "a.png"),)
    given: dict[str, Any] = {part: {"a": asked} if part == "pictured" else asked}
    probes = replace(EvaluationPrompts((), ()), **given)
    monkeypatch.setattr(behaviour, "observe", lambda *_: pytest.fail("asked"))
    refused(lambda: behaviour.measure(tiny, probes, PhraseJudge(), "test"), "<image> stands for a picture")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_endless_line_is_not_read_to_its_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"text\n" + b"a" * 10**6 + b"\xff")
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100)
    refused(lambda: list(tables.lines(tmp_path / name)), f"{name}, line 2: longer than 100 characters")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_endless_blank_lines_are_not_read_to_their_end(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text("\n" * 20)
    monkeypatch.setattr(tables, "MAX_LINES", 20)
    assert list(rows(tmp_path / name)) == []
    monkeypatch.setattr(tables, "MAX_LINES", 19)
    refused(lambda: list(rows(tmp_path / name)), f"{name}: over 19 lines")


def test_a_row_over_endless_lines_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100)
    (tmp_path / "a.csv").write_text("text,more\n" + '"a\n","b"\n' * 50)
    assert len(list(rows(tmp_path / "a.csv"))) == 50
    (tmp_path / "a.csv").write_text("text,more\n" + '"a\n",' * 50)
    refused(lambda: list(rows(tmp_path / "a.csv")), r"a\.csv, line 2\d: longer than 100 characters")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", '{"text": "a"}\n' * 4), ("a.csv", "text\n" + "a\n" * 4)])
def test_too_many_rows_are_refused(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(tables, "MAX_ROWS", 4)
    assert len(list(rows(tmp_path / name))) == 4
    monkeypatch.setattr(tables, "MAX_ROWS", 3)
    refused(lambda: list(rows(tmp_path / name)), rf"{name}, line [45]: over 3 rows")


@pytest.mark.parametrize(
    ("width", "height", "mode"), [(13300, 13300, "1"), (1, 2**14 + 1, "1"), (2, 201, "RGB"), (6000, 6000, "L")]
)
def test_an_absurd_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, width: int, height: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png", width, height, mode)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refused(
            lambda: load_image(path.parent, path.name, "here"), rf"^here: .* a picture of {width} x {height} pixels"
        )
    assert not said


def test_a_warning_of_pillows_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_image(tmp_path, picture(tmp_path / "a.png").name, "here").size == (4, 4)
    assert not said


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_pictures_of_every_format_that_is_named_are_opened(tmp_path: Path, format: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a", format)
    assert load_image(tmp_path, "a", "here").size == (4, 4)


@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_what_breaks_a_decoder_is_one_line(tmp_path: Path, name: str) -> None:
    data = picture(tmp_path / "sound.png").read_bytes()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    (tmp_path / name).write_bytes(program if name == "a.eps" else data[: len(data) // 2])
    refused(lambda: load_image(tmp_path, name, "here"), "^here: .* is not a readable picture")


def test_a_large_picture_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", path.stat().st_size - 1)
    refused(lambda: load_image(tmp_path, path.name, "here"), r"a\.png: larger than")


def test_a_picture_is_decoded_once_a_file_and_all_of_them_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"text": "what ?", "answer": "red"}
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "link.png").symlink_to("a.png")
    names = ["a.png", "./a.png", "link.png"] * 10
    qa = write(tmp_path / "qa.jsonl", *({**asked, "image": name} for name in names))
    monkeypatch.setattr(pictures, "MAX_PIXELS_TOGETHER", 20)
    for loaded in (load_evaluation_prompts(None, qa=qa).qa, load_benign(qa)):
        assert len(loaded) == 30 and len({id(each.image) for each in loaded}) == 1
    write(qa, *({**asked, "image": name} for name in (*names, "b.png")))
    for step in (lambda: load_evaluation_prompts(None, qa=qa), lambda: load_benign(qa)):
        refused(step, r"qa\.jsonl, line 31: the pictures up to here have over 20 pixels")


def sizes_of(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts at a time `module` passes to its function `name` as the last argument from now on."""
    seen: list[int] = []
    function = getattr(module, name)

    def counting(*given: Any) -> Any:
        seen.append(len(given[-1]))
        return function(*given)

    monkeypatch.setattr(module, name, counting)
    return seen


STEPS: dict[Any, Callable[[VLM, list[Prompt]], Any]] = {
    behaviour: lambda vlm, asked: behaviour.generate(vlm, asked, "test"),
    transcripts: lambda vlm, asked: list(
        transcripts.pages(vlm, transcripts.answer(vlm, asked, "test", tokens=1), "test")
    ),
    states: lambda vlm, asked: states.prompt_states(vlm, asked, [0], "test"),
}


@pytest.mark.parametrize("module", STEPS, ids=lambda module: module.__name__)
@pytest.mark.parametrize(("limit", "size"), [(1, 1), (3200, 2), (2**26, 5)])
def test_large_pictures_are_encoded_a_few_at_a_time(
    tiny: VLM, module: Any, limit: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MAX_PIXELS_AT_ONCE", limit)
    seen = sizes_of(module, "encode", monkeypatch)
    STEPS[module](tiny, [Prompt("how to walk ?", Image.new("RGB", (40, 40)))] * 5)
    assert max(seen) == size and sum(seen) % 5 == 0


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (3200, [2, 2, 1]), (2**26, [3, 2])])
def test_large_pictures_are_opened_a_few_at_a_time(
    tmp_path: Path, limit: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behaviour, "MAX_PIXELS_AT_ONCE", limit)
    monkeypatch.setattr(behaviour, "AT_ONCE", 3)
    named = [Pictured("how to walk ?", picture(tmp_path / "a.png", 40, 40))] * 5
    assert [len(group) for group in behaviour._opened(named)] == sizes
