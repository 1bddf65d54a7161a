"""`transformers serve` with the demo, asked over HTTP, says what the weights say. Needs guardfold[serve]."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import running

from guardfold.guard.model.vlm import load
from guardfold.guard.prompts.image_kinds import IMAGE_KINDS
from guardfold.pipeline import check_served
from guardfold.validators.behaviour.evaluation_prompts import load_evaluation_prompts
from guardfold.validators.behaviour.judge import PhraseJudge
from guardfold.validators.behaviour.measure import measure
from guardfold.validators.demo import DEMO
from guardfold.validators.runtimes.endpoint import Endpoint

pytestmark = pytest.mark.serve
SERVE = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of the demo's folder."""
    command = [sys.executable, "-c", SERVE, "serve", str(DEMO), "--dtype", "float32", "--device", "cpu"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(command, log, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1") as url:
        yield f"{url}/v1"


def test_what_is_served_does_what_the_weights_do(served: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DEMO / "probes.jsonl").read_text("utf-8").splitlines()]
    kept = [row for row in rows if row["harmful"]][:24] + [row for row in rows if not row["harmful"]][:12]
    few, qa = tmp_path / "few.jsonl", tmp_path / "none.jsonl"
    few.write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    qa.write_text("", encoding="utf-8")
    found = check_served(Endpoint(served, str(DEMO), concurrency=2), folder=DEMO, probes=few, qa=qa)
    probes = load_evaluation_prompts(DEMO, few, qa)
    weights = measure(load(DEMO, "cpu"), probes, PhraseJudge(probes.refusal), "weights")
    assert 0 < sum(weights.kinds["shape"].complied) < 24
    for kind in IMAGE_KINDS:
        assert found.behaviour.kinds[kind].answers == weights.kinds[kind].answers
