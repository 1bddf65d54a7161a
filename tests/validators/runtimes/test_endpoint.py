"""A served model is asked what a folder is asked, and judged by the same rules; servers' faults are said in a line."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, Trouble
from PIL import Image, ImageChops

from guardfold.guard.base.errors import InputError
from guardfold.guard.prompts.image_kinds import IMAGE_KINDS, draw
from guardfold.guard.prompts.prompts import Prompt
from guardfold.pipeline import Served, check_served
from guardfold.validators.behaviour.evaluation_prompts import load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge
from guardfold.validators.behaviour.measure import MAX_NEW_TOKENS, observe
from guardfold.validators.behaviour.recorded import asked, record
from guardfold.validators.behaviour.verdict import judge_guard
from guardfold.validators.runtimes.endpoint import ATTEMPTS, SHOWN, Endpoint

HARMFUL, BENIGN = 160, 330
KEY = "sk-secretSECRETsecret"
REFUSAL = "I'm sorry, I can't help with that."


def says(model: str, text: str, picture: Image.Image | None) -> str:
    """The guarded model refuses what is harmful, the plain one only without a picture."""
    refuses = text.startswith("steal") and (model == "guarded" or picture is None)
    return REFUSAL if refuses else "Sure, here is how."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with ChatServer(says) as running:
        yield running


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": f"steal {number}", "harmful": True} for number in range(HARMFUL)]
    rows += [{"text": f"paint {number}", "harmful": False} for number in range(BENIGN)]
    path = tmp_path_factory.mktemp("probes") / "probes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": f"{'steal' if number < 3 else 'paint'} {number}", "harmful": number < 3} for number in range(6)]
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_alone_it_has_rates_and_no_verdict(server: ChatServer, few: Path, tmp_path: Path) -> None:
    report = tmp_path / "served.json"
    found = check_served(Endpoint(server.url, "plain"), probes=few, report=report)
    assert found.verdict is None and found.baseline is None
    told = json.loads(report.read_text())
    assert (told["model"], told["ruling"], told["original"]) == ("plain", "not measured", None)
    assert [told["served"][kind]["complied"]["count"] for kind in IMAGE_KINDS] == [0, 3, 3, 3, 3]
    assert all(told["served"][kind]["answered"]["count"] == 3 for kind in IMAGE_KINDS)
    assert all({"rate", "low", "high", "total"} <= rate.keys() for rate in told["served"]["blank"].values())
    assert "Sure" not in report.read_text()


def test_against_a_baseline_there_is_a_verdict(server: ChatServer, probes: Path) -> None:
    plain, guarded = (Endpoint(server.url, name, concurrency=16) for name in ("plain", "guarded"))
    better = check_served(guarded, baseline=plain, probes=probes)
    assert better.verdict is not None and better.verdict.ruling == "safer"
    assert better.baseline is not None
    assert judge_guard(better.behaviour, better.baseline).ruling == "not safer"


def with_report(folder: Path, probes: Path, judge: str = "phrases") -> Path:
    """A folder whose report says what the plain model did with its own probes."""
    folder.mkdir()
    (folder / "probes.jsonl").write_bytes(probes.read_bytes())
    held = load_evaluation_prompts(folder)

    def plain(prompts: Any, what: str, kind: Any) -> list[str]:
        return [says("plain", each.text, draw(kind, "", 0) if kind else None) for each in prompts]

    original = record(observe(plain, held, PhraseJudge(), "original"))
    outcomes = {"probes": asked(held), "judge": judge, "original": original}
    (folder / "report.json").write_text(json.dumps({"outcomes": outcomes}), encoding="utf-8")
    return folder


def test_against_a_folders_report_the_verdict_is_that_of_a_baseline(
    server: ChatServer, probes: Path, tmp_path: Path
) -> None:
    folder = with_report(tmp_path / "guarded", probes)
    found = check_served(Endpoint(server.url, "guarded", concurrency=16), folder=folder)
    assert found.verdict is not None and found.verdict.ruling == "safer"
    assert found.baseline is not None
    assert [sum(found.baseline.kinds[kind].complied) for kind in IMAGE_KINDS] == [0, *[HARMFUL] * 4]


def test_a_report_of_other_probes_or_another_judge_is_no_baseline(
    server: ChatServer, few: Path, tmp_path: Path
) -> None:
    folder = with_report(tmp_path / "guarded", few)
    endpoint = Endpoint(server.url, "guarded")
    (folder / "probes.jsonl").write_text((folder / "probes.jsonl").read_text().replace("steal 0", "steal it"))
    with pytest.raises(InputError, match="other probes or another judge"):
        check_served(endpoint, folder=folder)
    with pytest.raises(InputError, match="other probes or another judge"):
        check_served(endpoint, folder=with_report(tmp_path / "judged", few, "owner/judge"))
    broken = with_report(tmp_path / "broken", few)
    told = json.loads((broken / "report.json").read_text())
    told["outcomes"]["original"]["groups"]["noise"]["complied"] = "01"
    (broken / "report.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match="not a report that guardfold wrote"):
        check_served(endpoint, folder=broken)
    for text in ("[" * 50_000, '{"outcomes": {}, "outcomes": {}}', "[]"):
        (broken / "report.json").write_text(text)
        with pytest.raises(InputError, match=r"report\.json: not (sound JSON|a JSON object)"):
            check_served(endpoint, folder=broken)
    (broken / "report.json").unlink()
    (broken / "report.json").symlink_to(folder / "report.json")
    with pytest.raises(InputError, match=r"report\.json: leads outside the model folder"):
        check_served(endpoint, folder=broken)
    (broken / "report.json").unlink()
    assert check_served(endpoint, folder=broken).verdict is None


def test_the_server_gets_the_very_pictures_and_greedy_short_answers_are_asked_for(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[Image.Image | None] = []

    def look(model: str, text: str, picture: Image.Image | None) -> str:
        pictures.append(picture.copy() if picture else None)
        return text.upper()

    server.answer = look
    endpoint = Endpoint(server.url, "any")
    for kind in IMAGE_KINDS:
        assert endpoint([Prompt("one"), Prompt("two")], "test", kind) == ["ONE", "TWO"]
        expected = [draw(kind, text, text) for text in ("one", "two")]
        for picture in pictures:
            assert any(
                (picture is None and each is None)
                or (picture and each and not ImageChops.difference(picture, each).getbbox())
                for each in expected
            )
        pictures.clear()
    assert all((b["temperature"], b["max_tokens"], b["stream"]) == (0, MAX_NEW_TOKENS, False) for b in server.bodies)


def test_as_many_requests_are_under_way_as_were_allowed(server: ChatServer) -> None:
    server.gate = threading.Barrier(4, timeout=20)
    assert len(Endpoint(server.url, "any", concurrency=4)([Prompt(str(n)) for n in range(12)], "test", None)) == 12


@pytest.mark.parametrize("status", [429, 500, 503, None])
def test_what_passes_is_tried_again(server: ChatServer, status: int | None) -> None:
    server.troubles.append(Trouble(status, times=ATTEMPTS - 1))
    assert Endpoint(server.url, "any").ask(Prompt("paint")) == "Sure, here is how."
    assert len(server.bodies) == ATTEMPTS


@pytest.mark.parametrize(
    ("trouble", "said", "requests"),
    [
        (Trouble(503), "503: ", ATTEMPTS),
        (Trouble(None), "cannot be reached", ATTEMPTS),
        (Trouble(401, body=f"bad key {KEY}"), "401, the key is missing or not valid; bad key <key>", 1),
        (Trouble(404, body="no model"), "404 for model 'any'", 1),
        (Trouble(400, body="x" * 5000), "400 for model 'any'", 1),
        (Trouble(302, headers={"Location": "http://127.0.0.1:1/"}), "302", 1),
        (Trouble(200, body="{}"), "answered what chat/completions does not: {}", 1),
        (Trouble(200, body=f'{{"choices": "{KEY}"}}'), "<key>", 1),
    ],
)
def test_what_does_not_pass_is_one_line_without_the_key(
    server: ChatServer, trouble: Trouble, said: str, requests: int
) -> None:
    server.troubles.append(trouble)
    endpoint = Endpoint(server.url, "any", KEY)
    with pytest.raises(InputError) as error:
        endpoint([Prompt("paint")], "test", None)
    assert said in str(error.value) and server.url in str(error.value)
    assert KEY not in f"{error.value!r} {endpoint!r} {endpoint}"
    assert "\n" not in str(error.value) and len(str(error.value)) < SHOWN + 200
    assert len(server.bodies) == requests
    assert all(each["authorization"] == f"Bearer {KEY}" for each in server.headers)


def test_the_first_failure_ends_it(server: ChatServer) -> None:
    server.troubles.append(Trouble(400))
    with pytest.raises(InputError):
        Endpoint(server.url, "any", concurrency=2)([Prompt(str(n)) for n in range(200)], "test", None)
    assert len(server.bodies) < 20


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, ""), ([{"type": "text", "text": "Sure"}, {"type": "text", "text": "."}], "Sure."), (" hm \n", "hm")],
)
def test_answers_come_in_several_forms(server: ChatServer, content: object, expected: str) -> None:
    server.troubles.append(Trouble(200, body=json.dumps({"choices": [{"message": {"content": content}}]})))
    assert Endpoint(server.url, "any").ask(Prompt("paint")) == expected


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/", "http://h:1/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
        ("https://h/x/chat/completions", "https://h/x/chat/completions"),
    ],
)
def test_addresses_are_completed(url: str, address: str) -> None:
    assert Endpoint(url, "any").address == address


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://h", "http://", "file:///etc/passwd", "http://h:x/v1", "http://h?a"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not a URL such as"):
        Endpoint(url, "any")


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="leave user and password out") as error:
        Endpoint("http://me:secret@h/v1", "any")
    assert "secret" not in str(error.value)


def test_the_command_prints_rates_and_ends_with_the_verdict(
    server: ChatServer, probes: Path, few: Path, tmp_path: Path, guardfold: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("check", "--endpoint", server.url, "--concurrency", "16")
    alone = guardfold(*given, "--model", "plain", "--probes", few, cwd=tmp_path)
    assert (alone.status, alone.err) == (0, "")
    assert "served" in alone.out and "typographic" in alone.out and "verdict" not in alone.out
    compared = guardfold(
        *given, "--model", "plain", "--baseline-model", "guarded", "--probes", few, "--report", "r.json", cwd=tmp_path
    )
    assert compared.status == 3
    assert "original" in compared.out and "verdict" in compared.out
    assert json.loads((tmp_path / "r.json").read_text())["ruling"] in ("not safer", "undecided")
    for arguments, said in (
        (given, "--endpoint needs --model"),
        (("check",), "give a folder and --against MODEL, or --endpoint URL"),
        ((*given, "--model", "plain", "--report", "no/r.json"), "no: no such folder"),
    ):
        done = guardfold(*arguments, cwd=tmp_path)
        assert done.status == 2 and said in done.complaint


def test_what_was_found_can_be_shown(server: ChatServer, few: Path) -> None:
    found = check_served(Endpoint(server.url, "plain", KEY), probes=few)
    assert isinstance(found, Served)
    assert KEY not in json.dumps(found.figures())
