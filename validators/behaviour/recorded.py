"""Outcomes, prompt by prompt, as report.json keeps them: what lets a later measurement be paired with this one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...guard.base.errors import InputError
from ...guard.base.untrusted import parse_object, read_bytes
from .evaluation_prompts import EvaluationPrompts
from .measure import Behaviour, Outcomes

REPORT = "report.json"
MAX_REPORT_BYTES = 64 * 2**20
NAMES = ("complied", "complied_first", "answered", "correct", "evaded")
LATER = ("evaded",)
"""Not in the reports of older versions."""


def asked(probes: EvaluationPrompts) -> str:
    """SHA-256 over what is asked, hexadecimal: outcomes of the same probes can be paired."""
    pictured = {name: [prompt.text for prompt in prompts] for name, prompts in probes.pictured.items()}
    pairs = [
        [(prompt.text, prompt.answer) for prompt in prompts] for prompts in (probes.harmful, probes.benign, probes.qa)
    ]
    questions = [(question.text, question.answer) for question in probes.questions]
    return hashlib.sha256(json.dumps([*pairs, questions, pictured]).encode()).hexdigest()


def record(behaviour: Behaviour) -> dict[str, Any]:
    """Returns every outcome as 0 or 1 in text, in the order of the probes."""
    groups = {**behaviour.pictured, **behaviour.kinds}
    table = {group: {name: _bits(getattr(outcomes, name)) for name in NAMES} for group, outcomes in groups.items()}
    return {"groups": table, "qa": _bits(behaviour.qa)}


def recall(folder: Path, probes: EvaluationPrompts, judge: str, like: Behaviour) -> Behaviour | None:
    """Returns the original's behaviour as the report of an exported `folder` has it; None if it measured none.

    like: a behaviour on the same probes.  Raises InputError if the report is of other probes, of another judge, or is
    none.
    """
    path = folder / REPORT
    if not os.path.lexists(path):
        return None
    outcomes = parse_object(read_bytes(folder, REPORT, MAX_REPORT_BYTES), str(path)).get("outcomes")
    try:
        if not outcomes:
            return None
        if (outcomes["probes"], outcomes["judge"]) != (asked(probes), judge):
            raise InputError(f"{path}: was measured with other probes or another judge; give the same, or a baseline")
        return _restored(outcomes["original"], like)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a report that guardfold wrote ({type(error).__name__}: {error})") from error


def _restored(table: Mapping[str, Any], like: Behaviour) -> Behaviour:
    def outcomes(group: str, model: Outcomes) -> Outcomes:
        bits = {**dict.fromkeys(LATER, ""), **table["groups"][group]}
        lists = {
            name: _read(bits[name], len(getattr(model, name))) for name in NAMES if bits[name] or name not in LATER
        }
        return Outcomes(**lists, answers=[], near=model.near)

    return Behaviour(
        {kind: outcomes(kind, model) for kind, model in like.kinds.items()},
        _read(table["qa"], len(like.qa)),
        {},
        {name: outcomes(name, model) for name, model in like.pictured.items()},
    )


def _bits(outcomes: list[bool]) -> str:
    return "".join("01"[outcome] for outcome in outcomes)


def _read(bits: str, count: int) -> list[bool]:
    if len(bits) != count or set(bits) - {"0", "1"}:
        raise ValueError(f"{count} outcomes expected")
    return [bit == "1" for bit in bits]
