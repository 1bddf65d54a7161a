"""guardfold check: what a guarded folder or a server does, measured afresh."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .._version import __version__
from ..export.formats import FORMATS
from ..export.formats.base import Job
from ..export.formats.safetensors import Safetensors
from ..export.publish.manifest import GUARD_FILE, written_rounding
from ..guard.base.errors import InputError
from ..guard.base.remote_code import trusting_if_asked
from ..guard.base.untrusted import is_folder
from ..guard.guard import Guard
from ..guard.model.vlm import threads_for
from ..validators.behaviour.evaluation_prompts import Asked, load_evaluation_prompts
from ..validators.behaviour.judge import judge_for
from ..validators.behaviour.measure import Behaviour, observe
from ..validators.behaviour.recorded import recall
from ..validators.behaviour.verdict import LIMITS, Limits, Verdict, judge_guard
from ..validators.evidence.evidence import NOT_MEASURED, Evidence
from ..validators.runtimes.endpoint import Endpoint
from .examining import Examiner
from .sources import based_on, open_source


@trusting_if_asked
def check_guarded(
    folder: Path,
    against: str,
    *,
    probes: Asked = None,
    qa: Path | None = None,
    judge: str | None = None,
    refusals: Path | None = None,
    limits: Limits = LIMITS,
    skip_behaviour: bool = False,
    family_file: Path | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
) -> Evidence:
    """Returns the evidence about the guarded `folder`, weights or adapters, measured afresh against the model that it
    was made from; with `adapter`, that is `against` after merging it.  limits: of the verdict.

    Raises InputError if either cannot be loaded or `folder` brings no guard file.
    """
    origin, guard = open_source(against, family_file), Guard.load(folder / GUARD_FILE, folder)
    rounding = written_rounding(folder)
    form = next((cls for cls in FORMATS.values() if not cls.derived and cls.found(folder)), Safetensors)()
    with based_on(origin, adapter, folder.parent) as model, threads_for(model.folder), TemporaryDirectory() as aside:
        held = form.hold(model, guard)
        artefact = form.open(Job(model, held, folder, model.checkpoint, Path(aside)))
        asked = None if skip_behaviour else load_evaluation_prompts(model.folder, probes, qa, refusals)
        ruling = judge_for(asked.refusal, asked.phrases, judge) if asked else None
        return Examiner(model, held, rounding, asked, ruling, limits, model.folder).of(artefact)


@dataclass(frozen=True)
class Served:
    """What a served model does, what its baseline does where there is one, and the verdict that follows."""

    endpoint: Endpoint
    behaviour: Behaviour
    baseline: Behaviour | None
    verdict: Verdict | None

    def figures(self) -> dict[str, Any]:
        """Returns everything measured, as JSON; no answers."""
        return {
            "guardfold": __version__,
            "endpoint": self.endpoint.address,
            "model": self.endpoint.model,
            "ruling": self.verdict.ruling if self.verdict else NOT_MEASURED,
            "verdict": self.verdict.figures() if self.verdict else None,
            "served": self.behaviour.figures(),
            "original": self.baseline.figures() if self.baseline else None,
        }


def check_served(
    endpoint: Endpoint,
    *,
    baseline: Endpoint | None = None,
    folder: Path | None = None,
    probes: Asked = None,
    qa: Path | None = None,
    judge: str | None = None,
    refusals: Path | None = None,
    report: Path | None = None,
) -> Served:
    """Returns the behaviour of what an endpoint serves. The verdict is against `baseline`, else against what the report
    of the exported `folder` has of its original, else there is none.

    folder: also brings its own probes.  report: a JSON file to write the figures to.  Raises InputError if the server,
    the probes or the folder cannot be used.
    """
    if folder and not is_folder(folder):
        raise InputError(f"{folder}: no such folder")
    if report and not is_folder(report.parent):
        raise InputError(f"{report.parent}: no such folder")
    asked = load_evaluation_prompts(folder, probes, qa, refusals)
    ruling = judge_for(asked.refusal, asked.phrases, judge)
    before = observe(baseline, asked, ruling, "baseline") if baseline else None
    now = observe(endpoint, asked, ruling, "served")
    if before is None and folder:
        before = recall(folder, asked, ruling.name, now)
    served = Served(endpoint, now, before, judge_guard(before, now) if before else None)
    if report:
        report.write_text(json.dumps(served.figures(), indent=2) + "\n", encoding="utf-8")
    return served
