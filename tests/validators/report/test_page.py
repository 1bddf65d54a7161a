"""report.html: one file that asks for nothing, runs nothing, and shows its pictures in a real browser.

The browser is Chromium (Debian and Ubuntu: apt-get install chromium).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from gates import full_guard

from guardfold.guard.prompts.image_kinds import IMAGE_KINDS
from guardfold.guard.prompts.prompts import Prompt
from guardfold.validators.behaviour.evaluation_prompts import EvaluationPrompts
from guardfold.validators.behaviour.measure import Behaviour, Outcomes
from guardfold.validators.evidence.samples import COUNT, SNIPPET, sampled
from guardfold.validators.report.page import render_page

CHROMIUM = "/usr/bin/chromium"
HOSTILE = '<script>alert(1)</script><img src="http://example.com/a.png" onerror="alert(2)">&"\''
NAMESPACES = {
    "http://www.w3.org/2000/svg",
    "http://www.w3.org/1999/xlink",
    "http://purl.org/dc/elements/1.1/",
    "http://creativecommons.org/ns#",
    "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "http://purl.org/dc/dcmitype/StillImage",
    "https://matplotlib.org/",
}


def outcomes(complied: int) -> Outcomes:
    flags = [index < complied for index in range(10)]
    answers = [f"{HOSTILE} harmful {index} " + "x" * 300 for index in range(10)] + [f"benign {i}" for i in range(10)]
    return Outcomes(flags, flags, [True] * 10, [True] * 10, answers)


def behaviour(complied: int) -> Behaviour:
    return Behaviour({kind: outcomes(complied) for kind in IMAGE_KINDS}, [True] * 9 + [False])


def figures(**changed: Any) -> dict[str, Any]:
    asked = tuple(Prompt(f"{HOSTILE} {index}") for index in range(10))
    before, after = behaviour(7), behaviour(1)
    samples = list(sampled(EvaluationPrompts(asked, asked), before, after))
    assert len(samples) == COUNT
    strips = {kind: {"harmful": [1.0, 2.0, 3.0], "benign": [-1.0, 0.0, 0.5]} for kind in IMAGE_KINDS}
    return {
        "ruling": "safer",
        "integrity": {"identical": 70, "edited": 6},
        "equivalence": {"folded": 1e-6, "edit": 0.3, "approximate": None, "tensor_leak": 2e-6, "rounding": "repair"},
        "original": before.figures(),
        "guarded": after.figures(),
        "reference": behaviour(2).figures(),
        "effects": {"projections": strips, "layer": 2},
        "verdict": {"reasons": [f"shape: {HOSTILE}"]},
        "samples": [vars(sample) for sample in samples],
    } | changed


def guard(**changed: Any) -> dict[str, Any]:
    row = {"layer": 2, "gain": 0.5, "refusal": 0.99, "allowed": True}
    return {
        "interventions": full_guard().describe(),
        "scores": {"harmful, text": [2.0, 2.1], "harmful, blank": [1.5, 2.2], "everything else": [-1.0, 0.0]},
        "held_out": {
            "auc": {"text": 1.0, "blank": 0.97},
            "opens": {"text": 1.0, "blank": 0.9},
            "fires_elsewhere": {"image": 0.001},
            "distance_to_clip": {"64": 2e-3, "256": 5e-4},
        },
        "selection": {"why": HOSTILE, "candidates": [row, {**row, "strength": HOSTILE}], "chosen": row},
    } | changed


EDITS = {"0": {}, "1": {"gate": 5, "projection": 2}, "2": {"projection": 2}, "other": {"projection": 1}}


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(HOSTILE, figures(), guard(), EDITS)


class Tags(HTMLParser):
    """Every tag with its attributes; raises at what is never closed or closed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert not tags.open
    return tags


def test_the_page_names_no_address_but_those_of_svg_namespaces(page: str) -> None:
    shown = page.replace("http://example.com/a.png", "")
    assert set(re.findall(r"https?://[^\s\"'<>)]+", shown)) <= NAMESPACES
    assert not re.search(r"@import|url\((?!#)|(?<!:)//[a-z0-9-]+\.[a-z]", re.sub(r"https?://", "", shown))


def test_nothing_in_the_page_runs_or_loads(page: str) -> None:
    for tag, attributes in parsed(page).tags:
        assert tag not in {"script", "img", "iframe", "link", "object", "embed", "base", "form", "audio", "video"}
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")


def test_hostile_text_is_shown_as_text(page: str) -> None:
    assert "<script" not in page.lower() and "<img" not in page.lower()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 1 + 1 + 2 + COUNT


def test_the_page_shows_every_section_with_its_picture(page: str) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Compliance with harmful prompts",
        "All rates",
        "Harmful and benign prompts along the safety steering direction",
        "The gate&#x27;s detector",
        "Edited tensors per layer",
        "How the guard was chosen",
        "Side by side",
        "Limits",
    ]
    assert page.count("<svg") == page.count("</svg>") == 4
    for name in ("original", "guarded", "two-pass", ">t0<", ">t1<", "typographic", "70.0 %", "10.0 %"):
        assert name in page


def test_harmful_answers_are_cut_and_say_so(page: str) -> None:
    samples = figures()["samples"]
    harmful = [each for each in samples if each["harmful"]]
    assert len(harmful) == COUNT // 2
    assert all(len(each[name]) == SNIPPET for each in harmful for name in ("original", "guarded"))
    assert all(each["original"].startswith("benign") for each in samples if not each["harmful"])
    assert {each["kind"] for each in harmful} == set(IMAGE_KINDS)
    assert "x" * SNIPPET not in page
    assert page.count(" ...</td>") == 2 * len(harmful)


def test_the_page_does_without_what_was_not_measured() -> None:
    nothing = dict.fromkeys(("original", "guarded", "reference", "effects", "verdict", "equivalence"))
    page = render_page("model", figures(ruling="not measured", samples=[], **nothing), {"interventions": []}, EDITS)
    assert page.count("<svg") == 1
    assert "not measured" in page
    assert parsed(page).tags


@pytest.mark.parametrize(
    "strange",
    [
        *(
            {"selection": value}
            for value in ("x", 5, [{"a": 1}], {"why": "x"}, {"candidates": 5, "why": "", "chosen": 1})
        ),
        *({"held_out": value} for value in ("x", 5, None, {"auc": {"text": "x"}})),
        *({"scores": value} for value in ("x", 5, [1], {"text": "x"}, {"text": [[1]]}, {"$x^{$": [1e999]})),
    ],
    ids=str,
)
def test_the_page_leaves_out_what_a_foreign_guard_says_in_a_way_of_its_own(strange: dict[str, Any]) -> None:
    said = render_page("model", figures(), guard(**strange), EDITS)
    assert ("How the guard was chosen" in said) == ("selection" not in strange)
    assert ("The gate&#x27;s detector" in said) == ("selection" in strange)
    assert parsed(said).tags


def test_names_in_a_foreign_guard_are_shown_as_text() -> None:
    row = {HOSTILE: HOSTILE}
    held_out = {name: {HOSTILE: 0.5} for name in ("auc", "opens", "fires_elsewhere")} | {"distance_to_clip": {"1": 0.5}}
    chosen = {"why": HOSTILE, "candidates": [row], "chosen": row}
    said = render_page("model", figures(), guard(selection=chosen, held_out=held_out, scores={HOSTILE: [1.0]}), EDITS)
    assert "How the guard was chosen" in said and "The gate&#x27;s detector" in said
    assert "<script" not in said.lower() and "<img" not in said.lower()
    assert parsed(said).tags


def test_the_same_figures_make_the_same_page(page: str) -> None:
    assert render_page(HOSTILE, figures(), guard(), EDITS) == page


def browse(path: Path, folder: Path) -> tuple[str, str]:
    """(document, log) of a page in headless Chromium, with no way to reach anything."""
    if not Path(CHROMIUM).exists():
        pytest.fail(f"{CHROMIUM} is missing; this test needs a browser: apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    own = [
        f"--user-data-dir={folder / 'profile'}",
        "--proxy-server=127.0.0.1:9",
        f"--log-net-log={folder / 'net.json'}",
    ]
    command = [CHROMIUM, *options, *own, path.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return found.stdout, found.stderr


@pytest.mark.browser
def test_it_renders_in_a_browser_without_an_error_or_a_request(page: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    document, log = browse(tmp_path / "report.html", tmp_path)
    assert document.count("<svg") == 4
    assert document.count("<section") == page.count("<section")
    assert "Side by side" in document and "<script" not in document
    assert "CONSOLE" not in log
    assert "example.com" not in (tmp_path / "net.json").read_text(errors="replace")


@pytest.mark.browser
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """The same browser on a page with a script and an image: both show where the test above looks."""
    (tmp_path / "bad.html").write_text("<script>oops()</script><img src='http://example.com/a.png'>")
    _, log = browse(tmp_path / "bad.html", tmp_path)
    assert "CONSOLE" in log
    assert "example.com" in (tmp_path / "net.json").read_text(errors="replace")
