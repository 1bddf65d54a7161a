"""Files that others wrote, beyond headers and indices: links, pipes, code, quantised weights, absurd numbers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import CONFIG, GOOD, container, folder_with, refused
from deadline import within
from gates import make_gate
from zoo import change_json, change_tensors, random_basis, tensors

from guardfold.export.checkpoint.headers import SINGLE_FILE, Checkpoint, header_bytes, parse_header
from guardfold.export.families.table import family_of
from guardfold.guard.base import untrusted
from guardfold.guard.base.errors import InputError
from guardfold.guard.base.remote_code import trusting
from guardfold.guard.base.untrusted import ASCII_FROM_BYTES, MAX_PARTS, parse_object
from guardfold.guard.guard import MAX_GUARD_BYTES, Guard, Intervention
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.model.vlm import meta_model, read_config
from guardfold.guard.prompts.image_files import load_image
from guardfold.guard.prompts.prompts import load_anchors
from guardfold.pipeline import Export, GuardOptions, export_guarded
from guardfold.validators.behaviour.recorded import recall
from guardfold.validators.runtimes.chat import answer_in_pieces


def exported(model: Path, place: Path, intervention: Intervention | None = None) -> Export:
    """`model` with `intervention`, or a projection, exported into `place` without measuring behaviour."""
    Guard((intervention or SublayerProjection({1: random_basis(1, 32)}),)).save(place / "guard.safetensors")
    options = GuardOptions(guard=str(place / "guard.safetensors"))
    return export_guarded(str(model), place / "out" / "guarded", options, skip_behaviour=True)


def configured(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """`folder` with a config.json that `change` has changed."""
    config = json.loads(CONFIG)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sound(tmp_path: Path) -> Path:
    return folder_with(tmp_path / "model", container(GOOD))


def test_a_header_is_parsed_from_its_bytes_alone() -> None:
    """As it comes by range requests, where there is no file."""
    data = container(GOOD)
    length = header_bytes(data[:8], len(data), "far away")
    assert list(parse_header(data[8 : 8 + length], len(data), "far away")) == list(GOOD)
    with pytest.raises(InputError, match=r"^far away: not a safetensors file"):
        header_bytes(data[:7], len(data), "far away")
    with pytest.raises(InputError, match=rf"^far away: {len(data) + 1} bytes long, its header describes {len(data)}$"):
        parse_header(data[8 : 8 + length], len(data) + 1, "far away")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"])
def test_no_file_that_would_be_read_leads_outside(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path)
    (tmp_path / "elsewhere").write_text(CONFIG)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, name, "leads outside the model folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "tokenizer.model"])
def test_no_file_that_would_be_read_is_a_pipe(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, name, "not a regular file")


def test_a_socket_a_device_and_a_link_to_itself_are_no_weights(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "model")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / SINGLE_FILE))
        refused(folder, SINGLE_FILE, "cannot be read|not a regular file")
    (folder / SINGLE_FILE).unlink()
    (folder / SINGLE_FILE).symlink_to("/dev/zero")
    refused(folder, SINGLE_FILE, "leads outside the model folder")
    (folder / SINGLE_FILE).unlink()
    (folder / SINGLE_FILE).symlink_to(SINGLE_FILE)
    refused(folder, SINGLE_FILE, "cannot be read|no .*weights|leads")


CODE = ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]


@pytest.mark.parametrize("name", CODE)
def test_code_of_a_models_own_is_refused(tmp_path: Path, name: str) -> None:
    folder = sound(tmp_path)
    held = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**held, "auto_map": {"AutoConfig": "code.Config"}}))
    refused(folder, name, r"names code of its own \(auto_map\), which is not run .* pass --trust-remote-code")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("value", ["owner/kernel", {"": "owner/kernel@main:flash"}], ids=["name", "by part"])
def test_kernels_from_the_hub_are_refused_whatever_is_trusted(
    tmp_path: Path, key: str, trust: bool, value: object
) -> None:
    folder = sound(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with trusting(trust):
        refused(folder, "config.json", rf"{key} names code on the hub \(owner/kernel.*\), which is never fetched")


def test_an_implementation_of_transformers_own_is_taken(tmp_path: Path) -> None:
    folder = sound(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "sdpa"}))
    assert read_config(folder)["attn_implementation"] == "sdpa"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\)"),
        ({"quant_method": "awq", "bits": 4}, r"quantised \(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\)"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, r"quantised \(fp8\)"),
        ({"config_groups": {}}, r"quantised \(quantization_config in config\.json\)"),
        (["int4"], r"quantised \(quantization_config in config\.json\)"),
    ],
)
@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantised_checkpoint_is_refused_with_advice(tmp_path: Path, part: str | None, entry: Any, says: str) -> None:
    folder = configured(
        sound(tmp_path), lambda config: (config[part] if part else config).update(quantization_config=entry)
    )
    refused(folder, str(folder), says + "; .*guard the base model and quantise the result again, or .*LoRA adapter")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("writer", [True, False], ids=["projected", "gated"])
def test_weights_of_a_dtype_that_cannot_be_folded_are_refused_by_name(
    tmp_path: Path, model: Path, dtype: torch.dtype, writer: bool
) -> None:
    name = f"language_model.model.layers.1.mlp.{'down' if writer else 'gate'}_proj.weight"
    change_tensors(model, lambda held: held.update({name: held[name].to(dtype)}))
    guard = SublayerProjection({1: random_basis(1, 32)}) if writer else make_gate(recycled=(0, 1))
    with pytest.raises(InputError, match=rf"tensor '{name}' is (F8_E|I8).*; quantised checkpoints are not folded: "):
        exported(model, tmp_path, guard)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("part", "key", "value", "limit"),
    [
        ("text_config", "num_hidden_layers", 10**6, 1024),
        ("vision_config", "num_hidden_layers", 10**9, 1024),
        ("text_config", "num_local_experts", 10**5, 1024),
        ("vision_config", "image_size", 2**20, 4096),
        ("text_config", "hidden_size", 2**40, 2**22),
        ("text_config", "num_hidden_layers", -(10**6), 1024),
        ("text_config", "max_position_embeddings", 2**60, 2**24),
        ("text_config", "sliding_window", 2**60, 2**32),
        ("text_config", "num_labels", 10**7, 2**16),
        ("text_config", "n_layer", 10**5, 1024),
        ("vision_config", "depths", 10**6, 1024),
    ],
)
def test_absurd_numbers_are_refused_before_a_model_is_made_of_them(
    tmp_path: Path, part: str, key: str, value: int, limit: int
) -> None:
    folder = configured(sound(tmp_path), lambda config: config[part].update({key: value}))
    refused(folder, "config.json", f"{key} is {value}, the limit is {limit}")


def test_a_model_with_buffers_of_gigabytes_is_refused_before_they_are_made(tmp_path: Path) -> None:
    """GPT Neo keeps a mask of all its positions squared."""
    sizes = {"max_position_embeddings": 50_000, "hidden_size": 32, "num_layers": 1, "num_heads": 4}
    text = {"model_type": "gpt_neo", **sizes, "attention_types": [[["global"], 1]]}
    folder = configured(sound(tmp_path), lambda config: config.update(text_config=text))
    with within(60), pytest.raises(InputError, match=r"no model that transformers can build \(.*allocate memory"):
        meta_model(folder)


@pytest.mark.parametrize(
    ("layers", "says"),
    [(4, "no tensor for"), (200, "no tensor for"), (2, "none of the model"), (0, "none of the model")],
)
def test_another_number_of_layers_than_there_are_tensors_for_is_refused(model: Path, layers: int, says: str) -> None:
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = layers
    (model / "config.json").write_text(json.dumps(config))
    with within(60), pytest.raises(InputError, match=says) as error:
        family_of(Checkpoint.open(model))
    assert "\n" not in str(error.value)


def test_json_that_would_fill_the_memory_is_refused_unread() -> None:
    with pytest.raises(InputError, match=f"^x: not sound JSON .over {MAX_PARTS} values"):
        parse_object(b"[" + b"{}," * MAX_PARTS + b"{}]", "x")
    with pytest.raises(InputError, match=r"^x: not sound JSON .over .* not all of them ASCII"):
        parse_object(b'{"a": "' + b"a" * ASCII_FROM_BYTES + "é".encode() + b'"}', "x")
    assert parse_object(b'{"a": "' + b"a" * ASCII_FROM_BYTES + b'"}', "x")


@pytest.mark.parametrize("levels", [99, 100, 900, 100_000])
def test_json_that_could_be_read_and_not_written_again_is_refused(levels: int) -> None:
    text = b'{"a": ' + b"[" * levels + b"]" * levels + b"}"
    if levels < 100:
        assert parse_object(text, "x")
        return
    with pytest.raises(InputError, match=r"^x: not sound JSON"):
        parse_object(text, "x")


def test_a_guard_file_that_is_far_too_large_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "guard.safetensors").open("wb") as file:
        file.truncate(MAX_GUARD_BYTES + 1)
    with pytest.raises(InputError, match=r"guard\.safetensors: larger than \d+ bytes"):
        Guard.load(tmp_path / "guard.safetensors")


def test_a_spreadsheets_mark_at_the_start_of_a_file_is_no_part_of_its_first_column(tmp_path: Path) -> None:
    for name, text in (
        ("anchors.csv", "harmful,harmless\nhow to steal ?,how to walk ?\n"),
        ("anchors.jsonl", '{"harmful": "how to steal ?", "harmless": "how to walk ?"}\n'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_anchors(tmp_path / name).harmful == ("how to steal ?",)


def test_a_prompt_file_that_is_far_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "anchors.jsonl").open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(InputError, match=r"anchors\.jsonl: larger than"):
        load_anchors(tmp_path / "anchors.jsonl")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a\0b", "absent.png", "linked.png"])
def test_a_picture_that_is_not_in_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images" / "linked.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"^here: .* is not a file inside"):
        load_image(tmp_path / "images", name, "here")


def test_a_report_outside_the_folder_or_that_would_fill_the_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text('{"outcomes": null}')
    (tmp_path / "good").mkdir()
    like: Any = None
    (tmp_path / "good" / "report.json").symlink_to("../secret")
    with pytest.raises(InputError, match=r"report\.json: leads outside the model folder"):
        recall(tmp_path / "good", like, "phrases", like)
    monkeypatch.setattr(untrusted, "MAX_PARTS", 1000)
    (tmp_path / "report.json").write_text(json.dumps({"a": [[]] * 2000}))
    with pytest.raises(InputError, match=r"report\.json: not sound JSON \(over 1000 values"):
        recall(tmp_path, like, "phrases", like)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "image_token_id", 10**6),
        (None, "image_token_index", "x"),
        (None, "vision_feature_layer", 99),
        (None, "return_dict", False),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": float("nan")}),
    ],
)
def test_a_config_that_breaks_a_pass_is_refused_in_one_line(
    model: Path, tmp_path: Path, part: str | None, key: str, value: object
) -> None:
    change_json(model / "config.json", **({part: {key: value}} if part else {key: value}))
    with pytest.raises(
        InputError, match=r"cannot run it|are zero or not finite|no model that|no image token|returns tuples"
    ) as error:
        exported(model, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "says"), [(0.0, "logits are zero"), (float("nan"), "NaN or Inf|not finite")])
def test_weights_that_say_nothing_are_refused(model: Path, tmp_path: Path, change: float, says: str) -> None:
    change_tensors(model, lambda found: found.update({name: tensor * 0 + change for name, tensor in found.items()}))
    with pytest.raises(InputError, match=says):
        exported(model, tmp_path)


def test_a_tensor_in_another_dtype_than_the_rest_is_compared_as_well(model: Path, tmp_path: Path) -> None:
    (name,) = [name for name in tensors(model) if name.endswith("layers.1.mlp.down_proj.weight")]
    change_tensors(model, lambda found: found.update({name: found[name].double()}))
    equivalence = exported(model, tmp_path).evidence.equivalence
    assert equivalence is not None
    assert equivalence.passed


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"stop_strings": ["a"]}, {"bad_words_ids": [[10**6]]}])
def test_what_a_generation_config_asks_for_besides_is_not_followed(model: Path, settings: dict[str, Any]) -> None:
    plain, changed = list[str](), list[str]()
    answer_in_pieces(str(model), "How?", None, plain.append)
    change_json(model / "generation_config.json", **settings)
    answer_in_pieces(str(model), "How?", None, changed.append)
    assert changed == plain


def test_a_generation_config_that_cannot_be_followed_is_refused(model: Path) -> None:
    change_json(model / "generation_config.json", eos_token_id="x")
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is 'x', not the number of a word"):
        answer_in_pieces(str(model), "How?", None, lambda _: None)


def test_templates_elsewhere_are_not_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jinja").write_text("secret")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "other.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(InputError, match=r"other\.jinja: leads outside the model folder"):
        read_config(model)
