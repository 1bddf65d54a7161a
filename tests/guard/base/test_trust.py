"""Code that comes with a model: not run unless asked for, and then only what lies in the folder, for that one call."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command, Done
from hub_server import HubServer
from own_code import AUTO_MAP, change_json, custom_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from zoo import Tiny, flip, random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats import Formats
from guardfold.export.publish.hub import Target, push
from guardfold.export.publish.verify import verify
from guardfold.guard.base import remote_code as trust
from guardfold.guard.base.errors import InputError
from guardfold.guard.base.hub import download
from guardfold.guard.base.remote_code import trusted, trusting
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.model.vlm import auto_class, load, meta_model, read_config
from guardfold.guard.prompts.prompts import Prompt, encode
from guardfold.pipeline import GuardOptions, check_guarded, export_guarded, extract_guard, inspect_model, trace_family
from guardfold.validators.behaviour.judge import ModelJudge

GUARD = Guard((SublayerProjection({1: random_basis(1, 32)}),))
REPO = "tester/custom"
VISION = """
[vision]
model_types = ["custom_vlm"]

[[vision.writer]]
role = "vision"
module = "model.multi_modal_projector.linear_2"
"""
"""All that the built-in rows lack: the custom model's text model is a known one."""

Run = Callable[..., Done]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Is there if code of the model's own was run."""
    return tmp_path / "was run"


@pytest.fixture
def model(tmp_path: Path, mark: Path) -> Path:
    return custom_model(tmp_path / "model", mark)


@pytest.fixture
def guard(tmp_path: Path) -> GuardOptions:
    """The options of an export of it."""
    GUARD.save(tmp_path / "guard.safetensors")
    (tmp_path / "family.toml").write_text(VISION)
    return GuardOptions(guard=str(tmp_path / "guard.safetensors"), family=tmp_path / "family.toml")


@pytest.fixture
def made(model: Path, guard: GuardOptions, tmp_path: Path) -> Path:
    """The guarded folder, written with trust."""
    output = tmp_path / "guarded"
    return export_guarded(str(model), output, guard, skip_behaviour=True, trust_remote_code=True).folder


@pytest.fixture
def run(guardfold: Command, tmp_path: Path) -> Run:
    return lambda *arguments: guardfold(*arguments, cwd=tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, says: str) -> None:
    """With trust, even so, in one line."""
    with trusting(True), pytest.raises(InputError, match=says) as error:
        read_config(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


VERBS = {
    "export": ("export", "--model", "model", "-o", "out"),
    "extract": ("extract", "--model", "model", "-o", "out", "--guard", "projection"),
    "check": ("check", "guarded", "--against", "model"),
    "chat": ("chat", "model", "how to walk ?"),
    "inspect": ("inspect", "model"),
    "trace": ("inspect", "model", "--trace"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_without_the_flag_every_command_refuses_and_runs_nothing(
    run: Run, model: Path, mark: Path, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "guarded" / "guardfold").mkdir(parents=True)
    GUARD.save(tmp_path / "guarded" / "guardfold" / "guard.safetensors")
    done = run(*VERBS[verb])
    assert done.status == 2 and not done.out
    assert "config.json: names code of its own (auto_map)" in done.complaint
    assert "--trust-remote-code" in done.complaint
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_with_the_flag_every_command_works(run: Run, model: Path, mark: Path, tmp_path: Path) -> None:
    GUARD.save(tmp_path / "guard.safetensors")
    flag = "--trust-remote-code"
    traced = run("inspect", "model", "--trace", flag)
    assert traced.status == 0 and mark.exists()
    (tmp_path / "family.toml").write_text(traced.out)
    row = ("--family", "family.toml", flag)
    assert "custom_vlm" in run("inspect", "model", *row).out
    export = run("export", "--model", "model", "-o", "out", "-g", "guard.safetensors", "--skip-behaviour", *row)
    assert export.status == 0, export.err
    assert (tmp_path / "out" / "modeling_custom.py").read_bytes() == (model / "modeling_custom.py").read_bytes()
    assert run("check", "out", "--against", "model", "--skip-behaviour", *row).status == 0
    assert run("chat", "out", "how to walk ?", "--max-tokens", 3, flag).status == 0
    assert run("extract", "--model", "model", "-o", "own.safetensors", "-g", "projection", *row).status == 0
    assert run("verify", "out").status == 0


def test_a_family_without_a_row_is_still_refused_by_name(model: Path) -> None:
    with pytest.raises(InputError, match="family 'custom_vlm' has no row; make one with inspect --trace"):
        inspect_model(str(model), trust_remote_code=True)


def test_what_is_traced_names_both_parts(model: Path) -> None:
    text = trace_family(str(model), trust_remote_code=True)
    assert 'model_types = ["llama"]' in text and 'model_types = ["custom_vlm"]' in text
    assert "layers.{layer}.self_attn.o_proj" in text and "model.multi_modal_projector.linear_2" in text


def test_rows_of_a_known_text_model_serve_a_custom_class(model: Path, guard: GuardOptions) -> None:
    _, family = inspect_model(str(model), guard.family, trust_remote_code=True)
    assert (family.text_model_type, family.layers, family.verdict) == ("llama", 3, "exact")


def test_the_guarded_folder_loads_in_plain_transformers_and_equals_the_hooks(model: Path, made: Path) -> None:
    folded: Any = AutoModelForImageTextToText.from_pretrained(made, trust_remote_code=True, dtype=torch.float32).eval()
    assert AutoProcessor.from_pretrained(made, trust_remote_code=True).tokenizer
    assert type(folded).__name__ == "CustomModel" and folded.config.model_type == "custom_vlm"
    with trusting(True):
        vlm = load(model, "cpu", torch.float32)
    inputs = encode(vlm, [Prompt("how to bake bread at home ?")])
    with torch.no_grad(), attached(vlm.model, GUARD):
        hooked = vlm.model(**inputs).logits
    with torch.no_grad():
        original = vlm.model(**inputs).logits
        assert torch.allclose(folded(**inputs).logits, hooked, rtol=0, atol=1e-4 * float(hooked.abs().max()))
    assert not torch.allclose(original, hooked, rtol=0, atol=1e-2)


def test_the_code_is_measured_with_the_weights(made: Path) -> None:
    manifest = json.loads((made / "guardfold.json").read_text())
    assert {"configuration_custom.py", "modeling_custom.py"} <= set(manifest["files"])
    assert not verify(str(made)).differences
    flip(made / "modeling_custom.py")
    assert verify(str(made)).differences == ["modeling_custom.py: differs"]


def test_the_card_says_what_loading_runs(made: Path, model: Path) -> None:
    card = (made / "README.md").read_text()
    for said in (
        "**Loading this runs Python code of the original's**, with your rights: `configuration_custom.py`, `modeling_",
        'AutoModelForImageTextToText.from_pretrained("PATH", trust_remote_code=True)',
        'AutoProcessor.from_pretrained("PATH", trust_remote_code=True)',
        "vllm serve PATH --served-model-name guarded --trust-remote-code",
        "family.toml --trust-remote-code",
    ):
        assert said in card
    assert "no custom code" not in card and "transformers.js" not in card


def test_a_guarded_folder_is_refused_and_trusted_like_any_other(made: Path, mark: Path, guard: GuardOptions) -> None:
    mark.unlink()
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        load(made)
    assert not mark.exists()
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        check_guarded(made, str(made), skip_behaviour=True, family_file=guard.family)
    with trusting(True):
        assert load(made, "cpu").width == 32


def test_trust_does_not_outlive_the_call(model: Path, mark: Path, guard: GuardOptions, tmp_path: Path) -> None:
    inspect_model(str(model), guard.family, trust_remote_code=True)
    with pytest.raises(InputError, match="has no row"):
        inspect_model(str(model), trust_remote_code=True)
    assert mark.exists() and not trusted()
    other = custom_model(tmp_path / "other", tmp_path / "other was run")
    for folder in (model, other):
        with pytest.raises(InputError, match="pass --trust-remote-code"):
            inspect_model(str(folder), guard.family)
    assert not (tmp_path / "other was run").exists()


def test_a_call_that_does_not_ask_is_not_trusted_inside_one_that_was(model: Path, guard: GuardOptions) -> None:
    with trusting(True):
        with pytest.raises(InputError, match="pass --trust-remote-code"):
            inspect_model(str(model), guard.family)
        assert trusted()


def test_a_guard_is_extracted_in_python_as_well(model: Path, mark: Path, guard: GuardOptions) -> None:
    options = GuardOptions(guard="projection", layers="1", family=guard.family)
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        extract_guard(str(model), options)
    assert not mark.exists()
    assert extract_guard(str(model), options, trust_remote_code=True).interventions


def test_the_judge_is_not_trusted(model: Path, mark: Path) -> None:
    """Its name is another model's, which nobody vouched for."""
    with trusting(True), pytest.raises(InputError, match=r"--judge .*: cannot be loaded"):
        ModelJudge(str(model))
    assert not mark.exists()


def test_threads_do_not_inherit_trust() -> None:
    seen: list[bool] = []
    with trusting(True):
        thread = threading.Thread(target=lambda: seen.append(trusted()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_only_true_is_trust(model: Path, mark: Path) -> None:
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        inspect_model(str(model), trust_remote_code="no")  # type: ignore[arg-type]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("config.json", {"auto_map": {**AUTO_MAP, "AutoModel": "owner/repo--modeling_custom.CustomModel"}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "owner/repo--modeling_custom.CustomModel"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "owner/repo--modeling_custom.CustomModel"]}}),
        ("tokenizer_config.json", {"auto_map": ["owner/repo--modeling_custom.CustomModel", None]}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "owner/repo--modeling_custom.CustomModel"}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": {"torch": "o/r--modeling_custom.A"}}}),
        ("more/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["o/r--modeling_custom.A", None]}}),
    ],
)
def test_code_of_another_repository_is_never_run(model: Path, mark: Path, file: str, entry: dict[str, Any]) -> None:
    (model / "more").mkdir()
    change_json(model / file, **entry)
    refused(model, rf"{file}: auto_map names code of another repository \(o\S*--modeling_custom\.\w+\), .* never run")
    assert not mark.exists()


@pytest.mark.parametrize("reference", ["../code.A", "/code.A", "sub/code.A", "code", "code.py.A", "a b.A", ""])
def test_what_is_no_module_of_the_folder_is_refused(model: Path, reference: str) -> None:
    change_json(model / "config.json", auto_map={**AUTO_MAP, "AutoModel": reference})
    refused(model, "which is no module.Class of the folder")


def test_a_module_that_is_not_there_is_refused_by_name(model: Path) -> None:
    (model / "modeling_custom.py").unlink()
    refused(model, r"names modeling_custom\.CustomModel, but the folder has no modeling_custom\.py")


@pytest.mark.parametrize("name", ["modeling_custom.py", "helper.py"])
def test_code_that_leads_outside_the_folder_is_refused(model: Path, mark: Path, name: str) -> None:
    outside = model.parent / "outside.py"
    outside.write_text("")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    refused(model, f"{name}: leads outside the model folder")
    (model / name).unlink()
    os.mkfifo(model / name)
    refused(model, f"{name}: not a regular file")
    assert not mark.exists()


def test_code_that_is_far_too_large_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MAX_CODE_BYTES", 100)
    refused(model, "larger than 100 bytes")


def test_a_generate_of_its_own_is_refused(model: Path) -> None:
    (model / "custom_generate").mkdir()
    refused(model, "custom_generate: generates by code of its own")


@pytest.mark.parametrize("auto_map", [None, [], "AutoConfig AutoModel", 5])
def test_an_auto_map_that_is_none_is_refused(model: Path, auto_map: Any) -> None:
    change_json(model / "config.json", auto_map=auto_map)
    refused(model, "auto_map is not an object|is no module.Class")


@pytest.mark.parametrize("lacking", ["AutoConfig", "AutoModelForImageTextToText"])
def test_a_custom_type_needs_a_config_and_a_class_with_a_head(model: Path, lacking: str) -> None:
    change_json(model / "config.json", auto_map={name: AUTO_MAP[name] for name in AUTO_MAP if name != lacking})
    refused(model, "'custom_vlm' is not .* knows, and its auto_map names no AutoConfig or none of AutoModelForImage")


@pytest.mark.parametrize("name", ["AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModel"])
def test_the_class_with_a_head_may_go_by_another_name(model: Path, guard: GuardOptions, name: str) -> None:
    entries = {"AutoConfig": AUTO_MAP["AutoConfig"], name: AUTO_MAP["AutoModelForImageTextToText"]}
    change_json(model / "config.json", auto_map=entries)
    made = export_guarded(
        str(model), model.parent / "guarded", guard, skip_behaviour=True, trust_remote_code=True
    ).folder
    assert f'{name}.from_pretrained("PATH", trust_remote_code=True)' in (made / "README.md").read_text()
    with trusting(True):
        assert auto_class(read_config(made)).__name__ == name
        assert type(load(made, "cpu").model).__name__ == "CustomModel"


def test_code_is_taken_from_the_folder_whatever_its_config_says(model: Path, tmp_path: Path) -> None:
    """Configs may hold the name of the folder that they once came from, and transformers would take code from there."""
    other = custom_model(tmp_path / "other", tmp_path / "other was run")
    with (other / "modeling_custom.py").open("a") as file:
        file.write(f"\nfrom pathlib import Path\n\nPath({str(tmp_path / 'other was run')!r}).touch()\n")
    change_json(model / "config.json", _name_or_path=str(other), name_or_path=str(other))
    with trusting(True):
        meta_model(model)
        load(model, "cpu")
    assert not (tmp_path / "other was run").exists()


def test_a_known_type_with_a_class_of_its_own_has_its_rows_and_no_graphs(
    model: Path, guard: GuardOptions, tmp_path: Path
) -> None:
    (model / "configuration_custom.py").write_text(
        "from transformers import LlavaConfig\n\n\nclass CustomConfig(LlavaConfig):\n    pass\n"
    )
    change_json(model / "config.json", model_type="llava")
    assert inspect_model(str(model), trust_remote_code=True)[1].model_type == "llava"
    options = GuardOptions(guard=guard.guard)
    with pytest.raises(InputError, match="CustomModel is code of the model's own, which has no ONNX graphs"):
        export_guarded(
            str(model), tmp_path / "out", options, Formats("onnx"), skip_behaviour=True, trust_remote_code=True
        )
    assert not (tmp_path / "out").exists()


def test_onnx_is_refused_by_name(model: Path, guard: GuardOptions, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--format onnx: family 'custom_vlm' has no ONNX graphs"):
        export_guarded(
            str(model), tmp_path / "out", guard, Formats("onnx"), skip_behaviour=True, trust_remote_code=True
        )


def test_an_adapter_is_written_without_the_code(model: Path, guard: GuardOptions, tmp_path: Path) -> None:
    made = export_guarded(
        str(model), tmp_path / "out", guard, Formats("lora"), skip_behaviour=True, trust_remote_code=True
    )
    assert made.evidence.sound and not list(made.folder.glob("*.py"))
    card = (made.folder / "README.md").read_text()
    assert '.from_pretrained("model", trust_remote_code=True), "PATH")' in card
    assert "the files `*.py` beside its weights" in card
    found = check_guarded(
        made.folder, str(model), skip_behaviour=True, family_file=guard.family, trust_remote_code=True
    )
    assert found.sound


def test_only_code_of_the_folder_itself_is_copied_and_only_where_some_is_named(
    model: Path, guard: GuardOptions, tmp_path: Path
) -> None:
    for place in ("helper.py", "images/helper.py", "sub/helper.py"):
        (model / place).parent.mkdir(exist_ok=True)
        (model / place).write_text("")
    made = export_guarded(str(model), tmp_path / "out", guard, skip_behaviour=True, trust_remote_code=True).folder
    found = {path.relative_to(made).as_posix() for path in made.rglob("*.py")}
    assert found == {"configuration_custom.py", "modeling_custom.py", "helper.py"}

    plain = Tiny().save(tmp_path / "plain")
    (plain / "handler.py").write_text("")
    options = GuardOptions(guard=guard.guard)
    made = export_guarded(str(plain), tmp_path / "two", options, skip_behaviour=True, trust_remote_code=True).folder
    assert not list(made.rglob("*.py")) and "no custom code" in (made / "README.md").read_text()


def test_a_processor_of_its_own_is_run_with_trust_alone(tmp_path: Path, mark: Path) -> None:
    folder = Tiny().save(tmp_path / "model")
    (folder / "processing_custom.py").write_text(
        "from pathlib import Path\n\nfrom transformers import LlavaProcessor\n\n"
        f"Path({str(mark)!r}).touch()\n\n\nclass CustomProcessor(LlavaProcessor):\n    pass\n"
    )
    change_json(folder / "processor_config.json", auto_map={"AutoProcessor": "processing_custom.CustomProcessor"})
    with pytest.raises(InputError, match=r"processor_config\.json: names code of its own"):
        load(folder, "cpu")
    assert not mark.exists()
    with trusting(True):
        assert type(load(folder, "cpu").processor).__name__ == "CustomProcessor"


@pytest.mark.parametrize("file", ["processor_config.json", "audio_tokenizer_config.json"])
def test_a_processor_loads_no_model_from_elsewhere(model: Path, mark: Path, tmp_path: Path, file: str) -> None:
    plain = Tiny().save(tmp_path / "plain")
    elsewhere = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(model)}
    whole = file.startswith("audio")
    change_json(plain / file, **(elsewhere if whole else {"audio_tokenizer": elsewhere}))
    refused(plain, rf"{file}: names a model outside the folder \(audio_tokenizer\)")
    with pytest.raises(InputError, match="names a model outside the folder"):
        load(plain, "cpu")
    assert not mark.exists()


def test_code_named_deep_in_a_config_is_refused_as_well(tmp_path: Path, mark: Path) -> None:
    folder = Tiny().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["auto_map"] = {"AutoModel": "code.Vision"}
    change_json(folder / "config.json", **config)
    with pytest.raises(InputError, match=r"config\.json: names code of its own"):
        load(folder, "cpu")


def test_from_the_hub_code_is_fetched_with_trust_alone(hub: HubServer, model: Path, guard: GuardOptions) -> None:
    hub.add(REPO, {**files_of(model), "images/a.png": b""})
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        inspect_model(REPO, guard.family)
    assert not list(download(REPO).glob("*.py"))
    assert not hub.requests(r"\.py")
    assert inspect_model(REPO, guard.family, trust_remote_code=True)[1].model_type == "custom_vlm"
    with trusting(True):
        assert load(download(REPO), "cpu").width == 32


def test_a_push_brings_the_code_and_removes_what_is_no_longer_there(hub: HubServer, made: Path) -> None:
    hub.add(REPO, {"old.py": b"", "config.json": b"{}"})
    push(made, Target(REPO), allow_weaker=True)
    assert {path for path in hub.repos[REPO].files("main") if path.endswith(".py")} == {
        "configuration_custom.py",
        "modeling_custom.py",
    }
    assert not verify(REPO).differences


def test_an_adapter_of_ones_own_is_merged_into_a_custom_model(model: Path, guard: GuardOptions, tmp_path: Path) -> None:
    adapter = export_guarded(
        str(model), tmp_path / "lora", guard, Formats("lora"), skip_behaviour=True, trust_remote_code=True
    ).folder
    made = export_guarded(
        str(model), tmp_path / "out", guard, skip_behaviour=True, adapter=str(adapter), trust_remote_code=True
    ).folder
    assert (made / "modeling_custom.py").is_file()
    with trusting(True):
        assert Checkpoint.open(made).tensors


def test_a_class_that_cannot_be_run_is_refused_in_one_line(model: Path) -> None:
    with (model / "modeling_custom.py").open("a") as file:
        file.write("\n    def forward(self, **inputs):\n        raise RuntimeError('not today\\nnor tomorrow')\n")
    with pytest.raises(InputError, match=r"^CustomModel: cannot be run to be traced \(not today\)$"):
        trace_family(str(model), trust_remote_code=True)


def test_a_config_without_a_text_model_is_refused_in_one_line(model: Path) -> None:
    with (model / "configuration_custom.py").open("a") as file:
        file.write("\n    def get_text_config(self, *_, **__):\n        return self\n")
    with pytest.raises(InputError, match=r"CustomConfig names no text model with a hidden_size$"):
        trace_family(str(model), trust_remote_code=True)


def test_a_copy_of_the_folder_is_its_own_model(model: Path, mark: Path, tmp_path: Path) -> None:
    """Trusting one folder says nothing of another with the same code."""
    with trusting(True):
        load(model, "cpu")
    mark.unlink()
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    with pytest.raises(InputError, match="pass --trust-remote-code"):
        load(copy, "cpu")
    assert not mark.exists()
