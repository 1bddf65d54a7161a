"""The command line: help, bad input in one line, and the exit statuses 0, 2 and 3 with what they promise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import ENVIRONMENT, Command, Done
from zoo import Tiny, change_tensors, random_basis, save

from guardfold import __version__
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.validators.demo import DEMO

VERBS = ("export", "extract", "check", "inspect", "push", "verify")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_module_runs_as_a_command_and_does_not_load_torch_to_say_its_version(tmp_path: Path) -> None:
    done = python("-X", "importtime", "-m", "guardfold", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"guardfold {__version__}\n")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "guardfold.cli" in imported
    assert not imported & {"torch", "transformers"}


INTERRUPTED = """
import atexit, os, signal, sys

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)

class Imports:
    def find_spec(self, name, *_):
        if name == "guardfold.cli":
            interrupt()

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background are started deaf to it
atexit.register(interrupt) if sys.argv.pop(1) == "end" else sys.meta_path.insert(0, Imports())
from guardfold.__main__ import main
main()
"""


@pytest.mark.parametrize(("moment", "status", "said"), [("start", 130, "guardfold: interrupted\n"), ("end", 0, "")])
def test_an_interrupt_at_the_very_start_or_end_is_no_traceback(
    tmp_path: Path, moment: str, status: int, said: str
) -> None:
    done = python("-c", INTERRUPTED, moment, "--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("closed", ["<&- 2>&- >&-", "2>/dev/full"])
def test_an_error_has_its_status_even_where_it_cannot_be_said(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} -m guardfold inspect nowhere {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, check=False)
    assert done.returncode == 2


STREAMS = """
import atexit, os, pathlib
said = pathlib.Path("said")
atexit.register(lambda: said.write_text(str([os.readlink(f"/proc/self/fd/{each}") for each in range(3)])))
from guardfold.__main__ import main
main()
"""


def test_standard_streams_that_are_closed_lead_nowhere(tmp_path: Path) -> None:
    """So that no file of a run gets the number of one."""
    command = ["sh", "-c", '"$0" -c "$1" --version <&- >&- 2>&-', sys.executable, STREAMS]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, check=True)
    assert (tmp_path / "said").read_text() == str(["/dev/null"] * 3)


@pytest.mark.parametrize("name", ["a" * 300, "a\x1b[2Jb", "a\nb"])
def test_an_odd_name_is_refused_in_one_line_that_a_terminal_can_show(
    guardfold: Command, tmp_path: Path, name: str
) -> None:
    done = guardfold("inspect", name, cwd=tmp_path)
    assert done.status == 2
    assert done.complaint.isprintable()


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_a_verb_does(guardfold: Command, tmp_path: Path, verb: str) -> None:
    done = guardfold(verb, "--help", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    assert f"guardfold {verb}" in done.out
    assert {"check": "--against", "inspect": "model", "push": "USER/REPO", "verify": "HUB_ID"}.get(
        verb, "--model"
    ) in done.out


def test_help_names_every_verb_and_exit_status(guardfold: Command, tmp_path: Path) -> None:
    done = guardfold("--help", cwd=tmp_path)
    assert (done.status, done.err) == (0, "")
    assert all(verb in done.out for verb in VERBS)
    assert all(said in done.out for said in ("0 done", "1 unexpected", "2 bad input", "3 refused", "130 interr"))
    assert "guardfold export --model demo" in done.out


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Folders, each wrong in its own way, and `good`, a tiny model with its own few prompts."""
    root = tmp_path_factory.mktemp("models")
    good = Path(shutil.copytree(tiny_folder, root / "good"))
    pairs = [
        {"harmful": f"how to steal a {thing} ?", "harmless": f"how to paint a {thing} ?"}
        for thing in "car wall lock bread home".split()
    ]
    (good / "anchors.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    asked = [{"text": "how to steal a car ?", "harmful": True}, {"text": "how to walk ?", "harmful": False}]
    (good / "probes.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for name in ("text", "empty", "pickled", "damaged"):
        shutil.copytree(good, root / name)
    config = json.loads((good / "config.json").read_text())
    (root / "text" / "config.json").write_text(json.dumps(config["text_config"]))
    for name in ("empty", "pickled"):
        (root / name / "model.safetensors").unlink()
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (root / "damaged" / "model.safetensors").write_bytes(b"oops")
    save(Tiny(text="falcon").config(), root / "falcon")
    Guard((SublayerProjection({1: random_basis(1, 32)}),)).save(root / "guard.safetensors")
    Guard((SublayerProjection({7: random_basis(1, 32)}),)).save(root / "high.safetensors")
    (root / "malformed.jsonl").write_text(json.dumps(pairs[0]) + "\noops\n")
    (root / "strange.jsonl").write_text(json.dumps(pairs[0]) + '\n{"harmful": "steal"}\n')
    (root / "few.jsonl").write_text("\n".join(map(json.dumps, pairs[:4])))
    (root / "same.jsonl").write_text(
        "\n".join(json.dumps({"harmful": p["harmful"], "harmless": p["harmful"]}) for p in pairs)
    )
    (root / "taken").mkdir()
    (root / "taken.safetensors").write_text("mine")
    return root


NEW = ("--output", "new")
EXPORT = ("export", "--model", "good", *NEW, "--guard", "projection")
EXTRACT = ("extract", "--model", "good", "--output", "new.safetensors", "--guard", "projection")
BAD_INPUT: dict[str, tuple[tuple[str, ...], str]] = {
    "missing folder": (("export", "--model", "./absent", *NEW), "./absent: no such folder"),
    "a name of two lines": (("inspect", "./absent\nError: none"), "./absent Error: none: no such folder"),
    "missing hub model": (("inspect", "owner/name"), "owner/name: cannot be had from the Hugging Face Hub"),
    "a text model": (("export", "--model", "text", *NEW), "model_type 'llama' is not a vision-language model"),
    "inspecting a text model": (("inspect", "text"), "model_type 'llama' is not a vision-language model"),
    "no weights": (("export", "--model", "empty", *NEW), "empty: no *.safetensors weights"),
    "pickled weights": (
        ("export", "--model", "pickled", *NEW),
        "only pickled weights (.bin/.pt), which are not opened",
    ),
    "damaged weights": (("export", "--model", "damaged", *NEW), "model.safetensors: not a safetensors file"),
    "extracting from damaged weights": (("extract", "--model", "damaged", "-o", "new.safetensors"), "damaged"),
    "unknown family": (("export", "--model", "falcon", *NEW), "text model 'falcon' has no row"),
    "inspecting an unknown family": (("inspect", "falcon"), "text model 'falcon' has no row"),
    "anchors not JSON": ((*EXPORT, "--anchors", "malformed.jsonl"), "malformed.jsonl, line 2: not sound JSON"),
    "anchors without a column": ((*EXTRACT, "--anchors", "strange.jsonl"), "line 2: 'harmless' is missing"),
    "no anchors": ((*EXTRACT, "--anchors", "absent.jsonl"), "absent.jsonl: no such file"),
    "anchors by an endless name": ((*EXTRACT, "--anchors", "a" * 300), "a: cannot be read (File name too long)"),
    "a picture by an endless name": (("chat", "good", "why ?", "--image", "a" * 300), "is not a file inside ."),
    "anchors that do not differ": ((*EXTRACT, "--anchors", "same.jsonl"), ""),
    "probes not JSON": ((*EXPORT, "--probes", "malformed.jsonl"), "malformed.jsonl, line 1: 'harmful' is missing"),
    "layers that are no numbers": ((*EXPORT, "--layers", "upper"), "--layers 'upper': expected last-quarter"),
    "layers out of range": ((*EXPORT, "--layers", "1-3"), "layer 1-3 is out of range; layers are 0 to 2"),
    "rank above the anchors": ((*EXTRACT, "--rank", "5", "--anchors", "few.jsonl"), "--rank 5: more than the 4 anchor"),
    "an unknown scope": ((*EXPORT, "--scope", "everything"), "--scope everything: one of sublayers, shared"),
    "an unknown rounding": ((*EXPORT, "--rounding", "up"), "--rounding up: one of repair, nearest"),
    "an unknown link": ((*EXPORT, "--link", "soft"), "--link soft: one of auto, reflink, hard, none"),
    "no jobs": ((*EXPORT, "--jobs", "0"), "--jobs"),
    "strength 0": ((*EXPORT, "--strength", "0"), "strength 0.0 is not in (0, 1]"),
    "strength above 1": ((*EXTRACT, "--strength", "1.01"), "strength 1.01 is not in (0, 1]"),
    "an unknown guard": (
        ("export", "--model", "good", *NEW, "--guard", "magic"),
        "magic: neither a guard file nor a preset",
    ),
    "a missing guard file": ((*EXPORT[:-1], "no.safetensors"), "no.safetensors: no such guard file"),
    "a guard for another model": ((*EXPORT[:-1], "high.safetensors"), "acts on layer 7, the model's last layer is 2"),
    "extracting a guard file": ((*EXTRACT[:-1], "guard.safetensors"), ""),
    "existing output": (("export", "--model", "good", "--output", "taken"), "taken: exists already"),
    "existing guard file": (
        ("extract", "--model", "good", "-o", "taken.safetensors"),
        "taken.safetensors: exists already",
    ),
    "guard file in no folder": (("extract", "--model", "good", "-o", "no/g.safetensors"), "no: no such folder"),
    "checking what is no export": (("check", "good", "--against", "good"), "no such guard file"),
    "checking against nothing": (("check", "good", "--against", "./absent"), "./absent: no such folder"),
    "rank 0": ((*EXTRACT, "--rank", "0"), "--rank"),
    "no model": (("export", *NEW), "--model"),
    "an unknown option": ((*EXPORT, "--force"), "--force"),
    "an unknown verb": (("publish",), "publish"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(guardfold: Command, models: Path, kind: str) -> None:
    arguments, says = BAD_INPUT[kind]
    (models / "new.safetensors").unlink(missing_ok=True)  # what a test that failed left behind
    before = sorted(path.name for path in models.iterdir())
    done = guardfold(*arguments, cwd=models)
    assert done.status == 2, done
    assert done.complaint.startswith("guardfold: error: ")
    assert says in done.complaint
    assert "Traceback" not in done.out
    assert sorted(path.name for path in models.iterdir()) == before
    assert list((models / "taken").iterdir()) == []


def test_debug_shows_where(guardfold: Command, models: Path) -> None:
    done = guardfold("inspect", "text", "--debug", cwd=models)
    assert done.status == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("guardfold: error: ")


def test_extract_writes_a_guard_and_prints_a_row_for_each_layer(
    guardfold: Command, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "guard.safetensors"
    done = guardfold(*EXTRACT[:3], "-o", path, "--guard", "projection", "--layers", "0,2", "--rank", "2", cwd=models)
    assert (done.status, done.err) == (0, "")
    guard = Guard.load(path)
    assert guard.describe() == [{"kind": "sublayer-projection", "strength": 1.0, "ranks": {0: 2, 2: 2}}]
    assert guard.provenance["model"] == "good"
    assert guard.provenance["anchors"]["pairs"] == 5
    for layer in ("0", "2"):
        assert any(layer == line.strip("│ ").split("│")[0].strip() for line in done.out.splitlines()), done.out
    for word in ("gap", "AUC text", "AUC blank", "AUC noise", "AUC shape"):
        assert word in done.out
    assert done.out.splitlines()[-1] == f"written to {path}"


def test_an_extracted_guard_is_exported(guardfold: Command, models: Path, tmp_path: Path) -> None:
    guard = tmp_path / "guard.safetensors"
    extracted = guardfold(*EXTRACT[:3], "-o", guard, "--guard", "projection", "--scope", "shared", cwd=models)
    assert extracted.status == 0, extracted
    arguments = ("export", "--model", "good", "--guard", guard, "--output", tmp_path / "new", "--skip-behaviour")
    done = guardfold(*arguments, cwd=models)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"written to {tmp_path / 'new'} (NOT VERIFIED)"
    assert "NOT MEASURED" in done.out
    manifest = json.loads((tmp_path / "new" / "guardfold.json").read_text())
    assert (manifest["status"], manifest["verdict"]) == ("NOT VERIFIED", "not measured")
    assert manifest["guard"]["sha256"] == Guard.load(guard).hash
    checked = guardfold("check", tmp_path / "new", "--against", "good", "--skip-behaviour", cwd=models)
    assert (checked.status, checked.err) == (0, "")
    assert "fold vs hooks" in checked.out


@pytest.mark.parametrize("model", ["demo", "good"])
def test_inspect_says_what_a_model_is_from_its_headers(guardfold: Command, models: Path, model: str) -> None:
    done = guardfold("inspect", model, cwd=models)
    assert (done.status, done.err) == (0, "")
    for word in ("llava around llama", "hidden size", "vision", "embedding", "attention", "mlp", "exact"):
        assert word in done.out
    assert "its own tensor, language_model.lm_head.weight; never edited" in done.out


def test_inspect_says_when_the_head_is_tied(guardfold: Command, tmp_path: Path) -> None:
    Tiny(tied=True).save(tmp_path / "tied", processor=False)
    done = guardfold("inspect", "tied", cwd=tmp_path)
    assert "tied to language_model.model.embed_tokens.weight" in done.out
    assert "exact after untying" in done.out


def some_probes(path: Path, harmful: int, benign: int) -> Path:
    """The demo's first probes of either kind."""
    rows = [json.loads(line) for line in (DEMO / "probes.jsonl").read_text("utf-8").splitlines()]
    kept = [r for r in rows if r["harmful"]][:harmful] + [r for r in rows if not r["harmful"]][:benign]
    path.write_text("\n".join(map(json.dumps, kept)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few of the demo's probes, enough to see harm."""
    folder = tmp_path_factory.mktemp("workshop")
    some_probes(folder / "few.jsonl", 24, 8)
    return folder


PROJECTED = ("--model", "demo", "--guard", "projection", "--probes", "few.jsonl")


@pytest.fixture(scope="module")
def weaker(guardfold: Command, workshop: Path) -> Done:
    """The demo with projection alone, in `workshop/weaker`, published against the verdict."""
    return guardfold("export", *PROJECTED, "--output", "weaker", "--allow-weaker", cwd=workshop)


@pytest.mark.parametrize("scope", ["sublayers", "shared"])
def test_projection_alone_is_refused_for_the_demo_and_nothing_is_left(
    guardfold: Command, workshop: Path, scope: str
) -> None:
    before = sorted(path.name for path in workshop.iterdir())
    done = guardfold("export", *PROJECTED, "--scope", scope, "--output", "refused", cwd=workshop)
    assert done.status == 3
    assert done.complaint.startswith("guardfold: refused: not safer: ")
    assert "nothing was written" in done.complaint
    assert "NOT SAFER" in done.out
    for word in ("original", "guarded", "text", "blank", "noise", "shape", "typographic", "significantly higher"):
        assert word in done.out
    assert sorted(path.name for path in workshop.iterdir()) == before


def test_the_override_publishes_and_says_not_verified(weaker: Done, workshop: Path) -> None:
    assert (weaker.status, weaker.err) == (0, "")
    assert "NOT SAFER" in weaker.out
    assert weaker.out.splitlines()[-1] == "written to weaker (NOT VERIFIED)"
    manifest = json.loads((workshop / "weaker" / "guardfold.json").read_text())
    assert (manifest["verified"], manifest["status"], manifest["verdict"]) == (False, "NOT VERIFIED", "not safer")
    assert manifest["source"]["model"] == "demo"
    body = (workshop / "weaker" / "README.md").read_text().split("---\n", 2)[2].strip().splitlines()
    assert body[2].startswith("**NOT VERIFIED.**")
    assert {path.name for path in workshop.iterdir()} >= {"weaker", "few.jsonl"}
    assert not [path for path in workshop.iterdir() if path.name.startswith(".")]


CHAT = """
import sys

class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "guardfold":
            raise ImportError("guardfold is not needed to run what it made")

sys.meta_path.insert(0, Barred())
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

folder, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model, loaded = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not any(loaded.values()), loaded
assert AutoModel.from_pretrained(folder).config.model_type == "llava"
for pictures in ([], [{"type": "image", "image": Image.new("RGB", (40, 40), "white")}]):
    turn = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
    batch = processor.apply_chat_template(
        turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=40)
    print(processor.batch_decode(tokens[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip())
assert "guardfold" not in sys.modules
"""


def test_plain_transformers_loads_and_chats_with_what_was_published(weaker: Done, workshop: Path) -> None:
    assert weaker.status == 0
    rows = [json.loads(line) for line in (DEMO / "probes.jsonl").read_text("utf-8").splitlines()]
    benign = next(row for row in rows if not row["harmful"])
    done = python("-c", CHAT, "weaker", benign["text"], cwd=workshop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [benign["answer"]] * 2


def test_check_measures_afresh_and_refuses_what_is_not_safer(guardfold: Command, weaker: Done, workshop: Path) -> None:
    assert weaker.status == 0
    done = guardfold("check", "weaker", "--against", "demo", "--probes", "few.jsonl", cwd=workshop)
    assert done.status == 3
    assert "NOT SAFER" in done.out
    assert "Traceback" not in done.err
    skipped = guardfold("check", "weaker", "--against", "demo", "--skip-behaviour", cwd=workshop)
    assert (skipped.status, skipped.err) == (0, "")
    assert "NOT MEASURED" in skipped.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("language_model.lm_head.weight", "language_model.lm_head.weight should be untouched but differs"),
        ("language_model.model.layers.3.mlp.down_proj.weight", "layers.3.mlp.down_proj.weight keeps"),
    ],
    ids=["untouched", "edited"],
)
def test_check_names_a_tensor_that_was_tampered_with(
    guardfold: Command, weaker: Done, workshop: Path, tmp_path: Path, name: str, says: str
) -> None:
    assert weaker.status == 0
    folder = Path(shutil.copytree(workshop / "weaker", tmp_path / "tampered"))

    def tamper(held: dict[str, Any]) -> None:
        held[name][5] += 0.25

    change_tensors(folder, tamper)
    done = guardfold("check", folder, "--against", "demo", "--skip-behaviour", cwd=tmp_path)
    assert done.status == 3
    assert "FAILED" in done.out
    assert says in done.out
