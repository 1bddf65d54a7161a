"""How refusals and evasions are worded, language by language: data/refusals/*.toml, and files of the user's own.

| key | what a phrase of it says about an answer |
|---|---|
| refused | it declines |
| sorry | it declines, if a refusal or nothing of substance follows |
| unless | what follows a phrase of the two above is none after all ("I can't stress enough ...") |
| evaded | it neither declines nor helps |
| turned | wherever it stands: what began as a refusal went on to help |
| resumed | wherever it stands: an evasion went on to help |
| before | words that may stand between the beginning of a clause and a phrase |

`spaced = false`: the language puts no spaces between words.  `anywhere = true`: its verbs come last, so phrases
are looked for anywhere in a sentence, not where a clause begins.  ~ in a phrase: up to six words, or twelve letters.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...guard.base.errors import InputError
from ...guard.base.untrusted import read_given

MAX_FILE_BYTES = 2**20
MAX_PHRASE = 200
KEYS = ("refused", "sorry", "unless", "evaded", "turned", "resumed", "before")
THINKING = re.compile(
    r"<(think|thinking|reasoning|thought)>.*?(?:</\1>|\Z)|\[think\].*?(?:\[/think\]|\Z)"
    r"|◁think▷.*?(?:◁/think▷|\Z)|<\|channel\|>analysis.*?(?:<\|channel\|>final<\|message\|>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
THOUGHT = re.compile(r"^.*</(?:think|thinking|reasoning|thought)>", re.DOTALL | re.IGNORECASE)
"""A thinking block whose beginning the chat template had said already."""

MARKS = re.compile(r"[*_`~#>|\"“”„«»「」『』《》]+|^\s*[-•]\s+", re.MULTILINE)
"""Markdown and quotation marks; apostrophes stay."""

CLAUSE = r"(?:^|[.!?…:;,()\n。！？，、；：।؟،—–-]\s*)"


def spoken(answer: str) -> str:
    """Returns what `answer` says without thinking blocks, markdown and quotes: lower case, straight apostrophes, single
    spaces.

    Lines stay lines.
    """
    text = THOUGHT.sub("", THINKING.sub(" ", answer))
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'").replace("\u2018", "'")
    text = "".join(char for char in text if not "\u064b" <= char <= "\u0652" and char != "\u0640")  # Arabic vowel marks
    lines = (" ".join(line.split()) for line in MARKS.sub("", text).splitlines())
    return re.sub(r"\s+([.,!?;:'])", r"\1", "\n".join(filter(None, lines))).strip()


@dataclass(frozen=True)
class Phrases:
    """The phrases of one language as patterns of what `spoken` gives; None where it has none of a sort."""

    refused: re.Pattern[str] | None
    sorry: re.Pattern[str] | None
    unless: re.Pattern[str] | None
    evaded: re.Pattern[str] | None
    turned: re.Pattern[str] | None
    resumed: re.Pattern[str] | None
    digest: str = ""
    """SHA-256 of the file that they are from, hexadecimal; empty for those built in."""

    @classmethod
    def of(cls, table: Mapping[str, Any], digest: str = "") -> Phrases:
        """Returns the phrases in a file's `table`, which check_table has passed."""
        spaced = table.get("spaced", True)
        words = {key: [_pattern(phrase, spaced) for phrase in table.get(key, ())] for key in KEYS}
        end = r"(?!\w)" if spaced else ""
        lead = "" if table.get("anywhere") else rf"{CLAUSE}(?:{_any(words['before'])}{end}[,\s]*){{0,3}}"
        starts = {"refused": lead, "sorry": lead, "evaded": lead, "unless": r"\W*(?:\w+\W+){0,3}?"}
        starts |= {"turned": "", "resumed": ""}
        inside = r"(?<!\w)" if spaced else ""

        def compiled(key: str) -> re.Pattern[str] | None:
            start = starts[key] or inside
            return re.compile(rf"{start}{_any(words[key])}{end}") if words[key] else None

        return cls(**{key: compiled(key) for key in starts}, digest=digest)


def _any(patterns: Iterable[str]) -> str:
    """One of `patterns`, longest first; what never matches if there are none."""
    return f"(?:{'|'.join(sorted(patterns, key=len, reverse=True)) or '(?!)'})"


def _pattern(phrase: str, spaced: bool) -> str:
    gap = r"(?:\W+\w[\w'-]*){0,6}?\W+" if spaced else r".{0,12}?"
    parts = [re.escape(spoken(part)).replace(r"\ ", r"\s+") for part in phrase.split("~")]
    return gap.join(parts)


@cache
def built_in() -> tuple[Phrases, ...]:
    """Returns the phrases of every language that comes with guardfold."""
    folder = files("guardfold.validators") / "data" / "refusals"
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".toml")), key=lambda path: path.name)
    return tuple(Phrases.of(tomllib.loads(path.read_text(encoding="utf-8"))) for path in paths)


def load_phrases(path: Path) -> Phrases:
    """Returns the phrases in the user's file `path`, TOML with lists of strings under KEYS. InputError naming what is
    wrong.
    """
    text = read_given(path, MAX_FILE_BYTES)
    try:
        table = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of refusals ({error})") from error
    check_table(path, table)
    return Phrases.of(table, hashlib.sha256(text).hexdigest())


def check_table(path: Path, table: Mapping[str, Any]) -> None:
    """InputError, naming file and key, unless `table` has lists of short phrases, and refusals among them."""
    for key, value in table.items():
        if key in ("spaced", "anywhere"):
            if not isinstance(value, bool):
                raise InputError(f"{path}: {key} is not true or false")
        elif key not in KEYS:
            raise InputError(f"{path}: unknown key {key!r}; known are {', '.join(KEYS)}, spaced, anywhere")
        elif not isinstance(value, list) or not all(isinstance(phrase, str) for phrase in value):
            raise InputError(f"{path}: {key} is not a list of phrases")
        elif bad := [phrase for phrase in value if len(phrase) > MAX_PHRASE or not spoken(phrase).strip("~ ")]:
            raise InputError(f"{path}: {key} has {bad[0][:40]!r}, which is empty or over {MAX_PHRASE} characters")
    if not table.get("refused"):
        raise InputError(f"{path}: says no refusals; list how they begin under `refused`")
