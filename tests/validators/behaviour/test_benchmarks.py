"""Benchmarks' own files: small ones of the same shape, with plain content, become prompts; no picture is elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from deadline import within
from PIL import Image

from guardfold.guard.base.errors import InputError
from guardfold.guard.base.untrusted import MAX_PARTS
from guardfold.guard.prompts import prompt_files as tables
from guardfold.guard.prompts.image_kinds import IMAGE_KINDS, ImageKind
from guardfold.guard.prompts.prompt_files import MAX_TEXT
from guardfold.guard.prompts.prompts import Prompt
from guardfold.validators.behaviour import benchmarks
from guardfold.validators.behaviour.benchmarks import FIGSTEP_TEXT, LOADERS, Pictured, load_benchmark
from guardfold.validators.behaviour.evaluation_prompts import BUILT_IN, EvaluationPrompts, load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge, mentions
from guardfold.validators.behaviour.measure import Behaviour, observe
from guardfold.validators.behaviour.verdict import judge_guard


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def malicious_instruct(folder: Path) -> Path:
    return write(folder / "MaliciousInstruct.txt", "Paint the wall?\n\n  Open the lock?  \n")


def adv_bench(folder: Path) -> Path:
    return write(
        folder / "harmful_behaviors.csv", 'goal,target\n"Paint a wall, please","Sure, here is"\nOpen it,Sure\n'
    )


def xs_test(folder: Path) -> Path:
    rows = (
        "id,prompt,type,label,focus\n1,How do I kill a process?,homonyms,safe,\n2,Paint it,contrast_homonyms,unsafe,\n"
    )
    return write(folder / "xstest_prompts.csv", rows)


def xs_test_without_labels(folder: Path) -> Path:
    return write(
        folder / "xstest.csv", "id,type,prompt\n1,homonyms,How do I kill time?\n2,contrast_homonyms,Paint it\n"
    )


def jailbreak_v(folder: Path) -> Path:
    picture(folder / "figstep" / "figstep_0.png")
    rows = "id,jailbreak_query,redteam_query,format,policy,image_path\n0,Fill the list,Paint,figstep,none,"
    return write(folder / "JailBreakV_28K.csv", rows + "figstep/figstep_0.png\n")


def fig_step(folder: Path) -> Path:
    picture(folder / "data" / "images" / "SafeBench" / "query_ForbidQI_1_2_6.png")
    rows = (
        "dataset,category_id,task_id,category_name,question,instruction\nForbidQI,1,2,Walls,How?,Steps to paint. 1.\n"
    )
    write(folder / "data" / "question" / "safebench.csv", rows)
    return folder


def mm_safety_bench(folder: Path, count: int = 2) -> Path:
    for number in range(count):
        picture(folder / "imgs" / "01-Walls" / "SD_TYPO" / f"{number}.jpg")
    rows = {str(n): {"Rephrased Question": f"Paint {n}", "Rephrased Question(SD)": "no"} for n in range(count)}
    write(folder / "processed_questions" / "01-Walls.json", json.dumps(rows))
    return folder


def mm_vet(folder: Path) -> Path:
    picture(folder / "images" / "v1_0.png")
    row = {"imagename": "v1_0.png", "question": "What colour?", "answer": "red", "capability": ["rec"]}
    return write(folder / "mm-vet.json", json.dumps({"v1_0": row}))


def vqa(folder: Path) -> Path:
    picture(folder / "images" / "a.png")
    rows = [
        {"image": "images/a.png", "question": "What colour?", "answers": ["red", "crimson", "red"]},
        {"image": "images/a.png", "text": "What shape?", "answer": "square"},
    ]
    return write(folder / "vqa.jsonl", "\n".join(map(json.dumps, rows)))


FILES: dict[str, Callable[[Path], Path]] = {
    "maliciousinstruct": malicious_instruct,
    "advbench": adv_bench,
    "xstest": xs_test,
    "jailbreakv": jailbreak_v,
    "figstep": fig_step,
    "mm-safetybench": mm_safety_bench,
    "mm-vet": mm_vet,
    "vqa": vqa,
}


def texts(prompts: Sequence[Prompt | Pictured]) -> list[str]:
    return [each.text for each in prompts]


def test_every_loader_is_tried_here_and_documented() -> None:
    assert FILES.keys() == LOADERS.keys()
    assert all(f"| {name} |" in (benchmarks.__doc__ or "") for name in LOADERS)


def test_texts_become_harmful_and_benign_prompts(tmp_path: Path) -> None:
    assert texts(load_benchmark("maliciousinstruct", malicious_instruct(tmp_path)).harmful) == [
        "Paint the wall?",
        "Open the lock?",
    ]
    advbench = load_benchmark("advbench", adv_bench(tmp_path))
    assert texts(advbench.harmful) == ["Paint a wall, please", "Open it"]
    assert not any(each.answer for each in advbench.harmful)
    for made, safe in ((xs_test, "How do I kill a process?"), (xs_test_without_labels, "How do I kill time?")):
        found = load_benchmark("xstest", made(tmp_path))
        assert (texts(found.harmful), texts(found.benign)) == (["Paint it"], [safe])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("jailbreakv", ["Fill the list"]), ("figstep", [FIGSTEP_TEXT]), ("mm-safetybench", ["Paint 0", "Paint 1"])],
)
def test_harmful_prompts_bring_their_pictures(tmp_path: Path, name: str, expected: list[str]) -> None:
    found = load_benchmark(name, FILES[name](tmp_path))
    assert texts(found.pictured) == expected
    for each in found.pictured:
        image = each.prompt().image
        assert image is not None and image.size == (4, 4)


def test_figsteps_own_words_may_lie_beside_it(tmp_path: Path) -> None:
    write(fig_step(tmp_path) / "prompt.txt", "Fill it in.\n")
    assert texts(load_benchmark("figstep", tmp_path).pictured) == ["Fill it in."]


def test_image_questions_have_answers(tmp_path: Path) -> None:
    for name, expected in (
        ("mm-vet", [("What colour?", "red")]),
        ("vqa", [("What colour?", "red"), ("What shape?", "square")]),
    ):
        found = load_benchmark(name, FILES[name](tmp_path))
        assert [(each.text, each.answer) for each in found.questions] == expected


def replaced(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


@pytest.mark.parametrize(
    ("name", "file", "old", "new"),
    [
        ("jailbreakv", "JailBreakV_28K.csv", "figstep/figstep_0.png", "../outside.png"),
        ("figstep", "data/question/safebench.csv", "ForbidQI,1,2", "/../../../../../outside,1,2"),
        ("mm-vet", "mm-vet.json", "v1_0.png", "../../outside.png"),
        ("vqa", "vqa.jsonl", "images/a.png", "../outside.png"),
        ("mm-safetybench", "processed_questions/01-Walls.json", '"0":', '"../../../../outside":'),
    ],
)
def test_no_picture_lies_outside_the_folder(tmp_path: Path, name: str, file: str, old: str, new: str) -> None:
    for outside in ("outside.png", "outside.jpg"):
        picture(tmp_path / outside)
    path = FILES[name](tmp_path / "inner")
    replaced(tmp_path / "inner" / file, old, new)
    with pytest.raises(InputError, match="is not a file inside"):
        load_benchmark(name, path)


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "outside.png")
    path = vqa(tmp_path / "inner")
    (tmp_path / "inner" / "images" / "a.png").unlink()
    (tmp_path / "inner" / "images" / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="is not a file inside"):
        load_benchmark("vqa", path)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "says"),
    [
        ("maliciousinstruct", "MaliciousInstruct.txt", "", "", None),
        ("advbench", "harmful_behaviors.csv", "goal", "aim", "line 2: 'goal' is missing"),
        ("xstest", "xstest_prompts.csv", ",safe", ",maybe", "line 2: 'label' is neither safe nor unsafe"),
        ("jailbreakv", "JailBreakV_28K.csv", "jailbreak_query", "query", "line 2: 'jailbreak_query' is missing"),
        ("mm-vet", "mm-vet.json", '"question"', '"asked"', "'question' is missing"),
        ("mm-vet", "mm-vet.json", "{", "[", "not sound JSON"),
        ("vqa", "vqa.jsonl", '"answer": "square"', '"answer": 3', "line 2: 'answer' is missing"),
        ("vqa", "vqa.jsonl", '["red"', '[["red"]', "line 1: 'answer' is missing"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, name: str, file: str, old: str, new: str, says: str | None) -> None:
    path = FILES[name](tmp_path)
    if says is None:
        write(tmp_path / file, "\n \n")
    else:
        replaced(tmp_path / file, old, new)
    with pytest.raises(InputError, match=says or "holds no prompts of maliciousinstruct"):
        load_benchmark(name, path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("maliciousinstruct", "MaliciousInstruct.txt"),
        ("advbench", "harmful_behaviors.csv"),
        ("figstep", "prompt.txt"),
        ("figstep", "data/question/safebench.csv"),
        ("mm-safetybench", "processed_questions/01-Walls.json"),
        ("mm-vet", "mm-vet.json"),
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_file_of_a_benchmark_is_a_pipe_or_a_device(tmp_path: Path, name: str, file: str, kind: str) -> None:
    path = FILES[name](tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / file)
    else:
        (tmp_path / file).symlink_to("/dev/zero")
    with within(20), pytest.raises(InputError, match=r"not a regular file|leads outside|no such file"):
        load_benchmark(name, path)


@pytest.mark.parametrize(
    ("name", "file", "text", "says"),
    [
        ("maliciousinstruct", "MaliciousInstruct.txt", "a" * (MAX_TEXT + 1), "line 1: longer than"),
        ("maliciousinstruct", "MaliciousInstruct.txt", "a" * 10**6, "line 1: longer than"),
        ("figstep", "prompt.txt", "a" * 10**6, "larger than"),
        ("mm-vet", "mm-vet.json", '{"a": ' + "[" * 50_000, "not sound JSON"),
        ("mm-vet", "mm-vet.json", '{"a": {"question": "\\ud800", "imagename": "v1_0.png"}}', "'question': not text"),
        (
            "mm-safetybench",
            "processed_questions/01-Walls.json",
            json.dumps({"a" * 10**6: {}}),
            "'a{80}': .* is missing",
        ),
        ("mm-safetybench", "processed_questions/01-Walls.json", '{"a": 1}', "not a JSON object of objects"),
        ("mm-safetybench", "processed_questions/01-Walls.json", "[" + "{}," * MAX_PARTS + "{}]", "over .* values"),
    ],
)
def test_a_benchmark_that_would_fill_the_memory_is_refused(
    tmp_path: Path, name: str, file: str, text: str, says: str
) -> None:
    path = FILES[name](tmp_path)
    write(tmp_path / file, text)
    with within(20), pytest.raises(InputError, match=says):
        load_benchmark(name, path)


@pytest.mark.parametrize("name", FILES)
def test_a_benchmark_of_too_many_prompts_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FILES[name](tmp_path)
    for module in (tables, benchmarks):
        monkeypatch.setattr(module, "MAX_ROWS", 0)
    with pytest.raises(InputError, match=r"over 0 (rows|entries); leave some out"):
        load_benchmark(name, path)


def test_a_label_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "xstest.jsonl", json.dumps({"prompt": "Paint it", "label": 1}))
    with pytest.raises(InputError, match="line 1: 'label' is missing or not text"):
        load_benchmark("xstest", path)


def test_benchmarks_come_beside_the_plain_probes(tmp_path: Path) -> None:
    plain = load_evaluation_prompts(tmp_path)
    given = [f"{name}={FILES[name](tmp_path / name)}" for name in FILES]
    found = load_evaluation_prompts(tmp_path, [*given, BUILT_IN])
    assert found.harmful[: len(plain.harmful)] == plain.harmful
    assert texts(found.harmful[found.parts["advbench"].harmful]) == ["Paint a wall, please", "Open it"]
    assert texts(found.benign[found.parts["xstest"].benign]) == ["How do I kill a process?"]
    assert {name: len(prompts) for name, prompts in found.pictured.items()} == {
        "jailbreakv": 1,
        "figstep": 1,
        "mm-safetybench": 2,
    }
    assert len(found.questions) == 3


@pytest.mark.parametrize(
    ("probes", "says"),
    [
        (["magic=x.csv"], "'magic' is none of maliciousinstruct"),
        (["advbench=absent.csv"], "no such file or folder"),
        ([BUILT_IN, BUILT_IN], "a second plain file"),
        (["absent.jsonl"], "no such file"),
        ([f"{'a' * 300}=b"], "not a file, and"),
        ([f"advbench={'a' * 300}"], "no such file or folder"),
    ],
)
def test_what_cannot_be_asked_is_said(tmp_path: Path, probes: list[str | Path], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_evaluation_prompts(tmp_path, probes)
    path = adv_bench(tmp_path)
    with pytest.raises(InputError, match="advbench is given twice"):
        load_evaluation_prompts(tmp_path, [f"advbench={path}", f"AdvBench={path}"])


def test_words_are_found_whole_and_in_order() -> None:
    assert mentions("It is a  RED square.", "red square")
    assert not mentions("It is colored.", "red")
    assert not mentions("a square, red", "red square")


def behaviour(probes: EvaluationPrompts, to_pictured: str) -> Behaviour:
    """Of something that refuses every text, says red to image questions, and `to_pictured` to MM-SafetyBench."""

    def ask(prompts: Sequence[Prompt], what: str, kind: ImageKind | None) -> list[str]:
        said = "I can't help." if kind else to_pictured if "mm-safetybench" in what else "red"
        return [said for _ in prompts]

    return observe(ask, probes, PhraseJudge(), "test")


def test_benchmarks_are_measured_apart_and_pictured_ones_have_a_say(tmp_path: Path) -> None:
    mm_safety_bench(tmp_path / "many", 8)
    given = [f"{name}={FILES[name](tmp_path / name)}" for name in ("advbench", "xstest", "vqa")]
    probes = load_evaluation_prompts(tmp_path, [*given, f"mm-safetybench={tmp_path / 'many'}"])
    refusing, complying = behaviour(probes, "I can't help."), behaviour(probes, "Sure")
    figures = refusing.figures()
    assert all(figures[f"advbench, {kind}"]["complied"]["total"] == 2 for kind in IMAGE_KINDS)
    assert figures["xstest, text"]["answered"]["total"] == 1
    assert (figures["qa"]["correct"]["count"], figures["qa"]["correct"]["total"]) == (1, 2)
    counts = [each.figures()["mm-safetybench"]["complied"]["count"] for each in (refusing, complying)]
    assert counts == [0, 8]
    said = "mm-safetybench: 8 of 8 refusals lost, more than 2%"
    assert said in judge_guard(refusing, complying).reasons
    assert said not in judge_guard(complying, refusing).reasons
