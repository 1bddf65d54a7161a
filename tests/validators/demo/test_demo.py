"""The demo: what its folder promises, what its world promises, and that another seed keeps the promises."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from guardfold.validators.demo import DEMO
from guardfold.validators.demo.__main__ import main
from guardfold.validators.demo.calibrate import PICTURE_KINDS
from guardfold.validators.demo.measure import figures, missed
from guardfold.validators.demo.speech import Turn, Voice
from guardfold.validators.demo.world import QUESTIONS, REFUSAL, TEMPLATES, Combo, World, question, words

LIMIT = 5_000_000


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


BINARY = {"model.safetensors", "tokenizer.model"}


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(DEMO)


def test_loads_without_missing_or_unexpected_tensors() -> None:
    loaded: Any = AutoModelForImageTextToText.from_pretrained(DEMO, output_loading_info=True)
    assert not any(loaded[1].values())


def test_folder_is_small_and_text_but_for_two_files() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT
    for path in files:
        if path.name not in BINARY:
            path.read_text("utf-8")


def test_row_counts() -> None:
    probes = read_rows(DEMO / "probes.jsonl")
    assert len(read_rows(DEMO / "anchors.jsonl")) >= 480
    assert sum(row["harmful"] for row in probes) >= 150
    assert sum(not row["harmful"] for row in probes) >= 400
    assert len(read_rows(DEMO / "qa.jsonl")) >= 120
    assert len({row["image"] for row in read_rows(DEMO / "qa.jsonl")}) >= 60
    assert len(read_rows(DEMO / "benign.jsonl")) >= 300


def test_pictures_open_and_are_shared_by_no_two_files() -> None:
    qa, benign = ({row.get("image") for row in read_rows(DEMO / name)} for name in ("qa.jsonl", "benign.jsonl"))
    assert not qa & benign
    assert qa | benign - {None} == {f"images/{path.name}" for path in (DEMO / "images").iterdir()}
    for image in map(str, qa | benign - {None}):
        assert Image.open(DEMO / image).size == (24, 24)


def test_anchors_and_probes_follow_the_rule_and_are_disjoint() -> None:
    about = json.loads((DEMO / "demo.json").read_text("utf-8"))
    world = World.from_seed(about["seed"])

    def asked(combos: list[Combo]) -> set[str]:
        return {question(combo, template) for combo in combos for template in range(len(TEMPLATES))}

    anchors = read_rows(DEMO / "anchors.jsonl")
    assert {row["harmful"] for row in anchors} <= asked(world.harmful("train"))
    assert {row["harmless"] for row in anchors} <= asked(world.benign("train"))
    for row in read_rows(DEMO / "probes.jsonl"):
        assert row["text"] in asked(world.harmful("test") if row["harmful"] else world.benign("test"))
        assert (row["answer"] == REFUSAL) == row["harmful"]
    assert about["refusal"] == REFUSAL
    assert about["world"] == world.sizes()


def test_both_tokenizers_agree_and_every_word_is_one_token(processor: Any) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    assert len(processor.tokenizer) == pieces.vocab_size()
    rows = [*read_rows(DEMO / "probes.jsonl"), *read_rows(DEMO / "benign.jsonl"), *read_rows(DEMO / "qa.jsonl")]
    sentences = {row[key] for row in rows for key in ("text", "answer")}
    turns = {f"user:{'<image>' * 9} {row['text']} assistant: {row['answer']}</s>" for row in rows}
    for sentence in sentences | {turn.removesuffix("</s>") for turn in turns}:
        assert processor.tokenizer.encode(sentence, add_special_tokens=False) == pieces.encode(sentence)
    for word in words():
        assert len(pieces.encode(word)) == 1


def test_every_byte_has_a_piece(processor: Any) -> None:
    text = "Grüße, 世界!\n\t{}"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("text", [question(Combo(3, 5), template) for template in range(len(TEMPLATES))])
@pytest.mark.parametrize("pictured", [False, True])
def test_training_speaks_exactly_the_chat_template(processor: Any, text: str, pictured: bool) -> None:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if pictured:
        content.append({"type": "image", "image": Image.new("RGB", (336, 336))})
    message = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert inputs["input_ids"][0] == Voice(processor).prompt(Turn(text, "", picture=0 if pictured else None))


def test_plain_string_content_renders_as_a_text_part(processor: Any) -> None:
    text = question(Combo(0, 0), 0)
    rendered = {
        processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for content in (text, [{"type": "text", "text": text}])
    }
    assert rendered == {f"user: {text} assistant:"}


def test_a_finished_turn_ends_with_the_end_of_sequence(processor: Any) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": REFUSAL}]
    assert processor.apply_chat_template(turns) == f"user: hi assistant: {REFUSAL}</s>"


def test_shipped_figures_meet_the_targets_and_can_be_measured_again() -> None:
    recorded = json.loads((DEMO / "demo.json").read_text("utf-8"))["figures"]
    assert missed(recorded) == []
    assert missed(figures(DEMO, every=4)) == []


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_world_is_a_function_of_the_seed(seed: int) -> None:
    assert World.from_seed(seed) == World.from_seed(seed)
    assert World.from_seed(seed).harmful_pairs != World.from_seed(seed + 1).harmful_pairs


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_and_no_single_word_decides(seed: int) -> None:
    world = World.from_seed(seed)
    parts = [
        set(kind(split))
        for split in ("train", "validation", "test")
        for kind in (world.benign, world.harmful, world.borderline)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 70 * 70
    assert len(world.harmful_pairs) == 16
    assert len(world.borderline_pairs) == 5
    assert world.borderline_pairs < world.harmful_pairs
    for axis, of in itertools.product((0, 1), range(6)):
        assert 2 <= sum(pair[axis] == of for pair in world.harmful_pairs) <= 4


def test_every_question_has_its_answer_for_each_picture_shown() -> None:
    for row in read_rows(DEMO / "qa.jsonl"):
        asked = next(answer for text, answer in QUESTIONS.values() if text == row["text"])
        before, after = asked.split("{}")
        assert row["answer"].startswith(before)
        assert row["answer"].endswith(after)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--seed", "x", "--output", "made"], "invalid int"),
        (["--seed", "-1", "--output", "made"], "--seed -1"),
        (["--seed", "0", "--output", "absent/made"], "no folder"),
        (["--seed", "0", "--output", "."], "exists"),
        (["--seed", "0", "--output", ".", "--overwrite"], "is not a demo"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    complaint = capsys.readouterr().err
    assert reason in complaint
    assert len(complaint.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.rebuild
def test_rebuild_from_another_seed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = [sys.executable, "-m", "guardfold.validators.demo", "--seed", "7", "--output", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads((made / "demo.json").read_text("utf-8"))
    assert about["seed"] == 7
    assert missed(about["figures"]) == []
    assert set(about["figures"]["compliance"]) == {*PICTURE_KINDS, "mean"}
    assert list(tmp_path.iterdir()) == [made]
