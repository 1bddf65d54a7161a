"""What lies in a folder beside a model, in its config or among its tensors is read as transformers does, or refused.

Each way is a folder with something more or less in it. What is refused is refused by name, from headers and config
alone; what is taken is held to what plain transformers loads, before and after the fold.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command
from gates import make_gate
from safetensors.torch import save_file
from specimens import Knobs, Specimen, build
from specimens.beyond import BEYOND
from specimens.known import KNOWN
from torch import Tensor
from transformers import AutoModelForImageTextToText
from zoo import Tiny, change_json, change_tensors, random_basis, tensors

from guardfold.export.checkpoint.companions import copy_companions
from guardfold.export.checkpoint.config import check_new_model
from guardfold.export.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Checkpoint
from guardfold.export.checkpoint.layout import Layout
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import family_of
from guardfold.export.fold import fold, widened
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.guard.model.vlm import load, meta_model
from guardfold.pipeline import GuardOptions, extract_guard
from guardfold.validators.evidence.integrity import inspect_folder
from guardfold.validators.evidence.loaded import check_loaded

OLD, NEW = "language_model.model.layers.1.", "model.language_model.layers.1."
DOWN = "mlp.down_proj.weight"
Way = Callable[[Path], Any]
SPECIMENS = {specimen.name: specimen for specimen in (*KNOWN, *BEYOND)}


def with_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Way:
    return lambda folder: change_tensors(folder, change)


def with_config(**values: Any) -> Way:
    return lambda folder: change_json(folder / "config.json", **values)


def without_text(folder: Path, entry: str, **outer: Any) -> None:
    """config.json without an entry of the text model's, and others outside it."""
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"][entry]
    (folder / "config.json").write_text(json.dumps(config | outer))


def with_file(name: str, content: str = "{}") -> Way:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return write


def with_weights(*names: str, change: float = 1.0) -> Way:
    """Other weights under `names`, where a reader who takes them for the model's would load them."""

    def write(folder: Path) -> None:
        other = {name: each + change for name, each in tensors(folder).items() if each.is_floating_point()}
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(other, folder / name, {"format": "pt"})

    return write


def in_shards(folder: Path, **index: Any) -> None:
    """The weights in two files and an index, with other entries for it; a value of None removes one."""
    held = tensors(folder)
    (folder / SINGLE_FILE).unlink()
    names = sorted(held)
    places = {name: f"model-{2 * at // len(names) + 1}.safetensors" for at, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: held[name] for name in names if places[name] == file}, folder / file, {"format": "pt"})
    table = {"metadata": {}, "weight_map": places} | index
    (folder / INDEX_FILE).write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def in_shards_of(dtype: str) -> Way:
    """The dtype stands in the index alone."""

    def write(folder: Path) -> None:
        in_shards(folder, metadata={"dtype": dtype})
        with_config(dtype=None)(folder)

    return write


def in_shards_beside_other_weights(folder: Path) -> None:
    in_shards(folder)
    with_weights("model.safetensors")(folder)


def in_shards_with_one_unlisted(folder: Path) -> None:
    in_shards(folder)
    with_weights("model-3.safetensors")(folder)


def in_two_shards(folder: Path) -> None:
    in_shards(folder)
    path = folder / "model-2.safetensors"
    held = dict(tensors(folder))
    places = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    mine = {name: each for name, each in held.items() if places[name] == path.name}
    save_file(mine | {min(held): held[min(held)] + 1}, path, {"format": "pt"})


def move(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({new: held.pop(old)})


def copied(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({new: held[old] + 1})


REFUSED: dict[str, tuple[Way, str]] = {
    "a leftover adapter": (
        with_file("adapter_config.json"),
        r"adapter_config\.json: transformers would put this adapter",
    ),
    "files of several processes": (
        with_weights("shard-00001-model-00001-of-00001.safetensors"),
        r"shard-00001-model-00001-of-00001\.safetensors: transformers would load such files instead",
    ),
    "only a variant": (
        lambda folder: (folder / SINGLE_FILE).rename(folder / "model.fp16.safetensors"),
        r"neither model\.safetensors nor",
    ),
    "an index without metadata": (lambda folder: in_shards(folder, metadata=None), r"index\.json: no metadata"),
    "an index whose metadata is no object": (
        lambda folder: in_shards(folder, metadata=[]),
        r"index\.json: no metadata",
    ),
    "a tensor in two shards": (in_two_shards, r"model-2\.safetensors: tensor '\S+' is not in the index"),
    "another weights file named": (with_config(transformers_weights="a.safetensors"), "transformers_weights is set"),
    "another config named": (with_config(configuration_files=["config.5.0.0.json"]), "configuration_files is set"),
    "loaded as whole numbers": (with_config(dtype="int8"), "dtype is 'int8', in which no model is loaded"),
    "loaded as nothing known": (with_config(torch_dtype=["float32"]), r"torch_dtype is \['float32'\], in which"),
    "an index of a dtype of no number": (
        in_shards_of("floaty"),
        r"index\.json: metadata says that dtype is 'floaty', in which no model is loaded",
    ),
    "an index of a whole dtype": (
        in_shards_of("int8"),
        r"index\.json: metadata says that dtype is 'int8'",
    ),
    "an encoder and a decoder": (with_config(is_encoder_decoder=True), "is_encoder_decoder is True"),
    "an encoder inside": (with_config(text_config={"is_encoder_decoder": True}), "is_encoder_decoder is True"),
    "an end that is no word": (
        with_file("generation_config.json", '{"eos_token_id": "</s>"}'),
        r"generation_config\.json: eos_token_id is '</s>', not the number of a word",
    ),
    "beams that are no number": (
        with_file("generation_config.json", '{"num_beams": "four"}'),
        r"generation_config\.json: num_beams is 'four', not a number",
    ),
    "no room for an answer": (
        with_file("generation_config.json", '{"max_new_tokens": -5}'),
        r"generation_config\.json: transformers does not take it .*max_new_tokens",
    ),
    "a list of generation settings": (with_file("generation_config.json", "[]"), "not a JSON object"),
    "tuples": (with_config(return_dict=False), "return_dict is false"),
    "fused modules": (with_config(fusion_config={"patch_embeddings": True}), "fusion_config is set"),
    "quantised": (with_config(quantization_config={"quant_method": "fp8"}), "quantised .fp8."),
    "quantised inside": (with_config(text_config={"quantization_config": {"quant_method": "fp8"}}), "quantised .fp8."),
    "quantised somehow": (with_config(vision_config={"quantization_config": {}}), "quantised .quantization_config in"),
    "code": (with_config(auto_map={"AutoModel": "a.B"}), "names code of its own"),
    "a layer's old and new name": (
        with_tensors(copied(OLD + DOWN, NEW + DOWN)),
        f"'{OLD}{DOWN}' and '{NEW}{DOWN}' are both {NEW}{DOWN}",
    ),
    "a head's old and new name": (
        with_tensors(copied("language_model.lm_head.weight", "lm_head.weight")),
        "'language_model.lm_head.weight' and 'lm_head.weight' are both lm_head.weight",
    ),
    "a tower's old and new name": (
        with_tensors(copied("vision_tower.pre_layrnorm.weight", "model.vision_tower.pre_layrnorm.weight")),
        "are both model.vision_tower.pre_layrnorm.weight",
    ),
    "the same under both names": (
        with_tensors(lambda held: held.update({NEW + DOWN: held[OLD + DOWN].clone()})),
        f"are both {NEW}{DOWN}",
    ),
    "no head": (
        with_tensors(lambda held: held.pop("language_model.lm_head.weight")),
        "no tensor for lm_head.weight, which config.json does not tie",
    ),
    "no norm": (
        with_tensors(lambda held: held.pop(OLD + "input_layernorm.weight")),
        "no tensor for model.*layers.1.inp",
    ),
    "a bias missing": (
        with_tensors(lambda held: held.pop("vision_tower.post_layernorm.bias")),
        "no tensor for model.vision_tower.post_layernorm.bias",
    ),
    "a garbled name": (
        with_tensors(move(OLD + DOWN, OLD + "mlp.down_porj.weight")),
        f"no tensor for {NEW}{DOWN} .'{OLD}mlp.down_porj.weight' is none of the model's",
    ),
    "a name in capitals": (with_tensors(move(OLD + DOWN, (OLD + DOWN).upper())), f"no tensor for {NEW}{DOWN}"),
    "a name with an invisible letter": (with_tensors(move(OLD + DOWN, OLD + DOWN + "\u200b")), "not a tensor name"),
    "wrapped names": (
        with_tensors(lambda held: [move(name, f"module.{name}")(held) for name in list(held)]),
        "no tensor for .* .'module.",
    ),
    "an update that was not merged": (
        with_tensors(lambda held: held.update({OLD + "mlp.down_proj.lora_A.weight": torch.ones(2, 48)})),
        "lora_A.weight' is none of the model's",
    ),
    "a bias too many": (
        with_tensors(lambda held: held.update({"language_model.lm_head.bias": torch.ones(36)})),
        "'language_model.lm_head.bias' is none of the model's",
    ),
    "a tensor of no elements": (
        with_tensors(lambda held: held.update(empty=torch.zeros(0, 4))),
        "'empty' is none of the",
    ),
    "a weight of no elements": (
        with_tensors(lambda held: held.update({OLD + DOWN: torch.zeros(0, 48)})),
        rf"'{OLD}{DOWN}' has shape \[0, 48\], config.json says \[32, 48\]",
    ),
    "a weight turned": (
        with_tensors(lambda held: held.update({OLD + DOWN: held[OLD + DOWN].T})),
        rf"'{OLD}{DOWN}' has shape \[48, 32\], config.json says \[32, 48\]",
    ),
    "a norm with an axis too many": (
        with_tensors(lambda held: held.update({OLD + "input_layernorm.weight": torch.ones(1, 32)})),
        r"has shape \[1, 32\], config.json says \[32\]",
    ),
    "whole numbers": (
        with_tensors(lambda held: held.update({OLD + DOWN: held[OLD + DOWN].to(torch.int8)})),
        f"'{OLD}{DOWN}' is I8; quantised",
    ),
    "fewer layers in the config": (
        with_config(text_config={"num_hidden_layers": 2}),
        "layers.2.* is none of the model's",
    ),
    "fewer layers inside the config": (
        with_config(num_hidden_layers=3, text_config={"num_hidden_layers": 2}),
        "layers.2.* is none of the model's",
    ),
    "layers counted outside alone": (
        lambda folder: without_text(folder, "num_hidden_layers", num_hidden_layers=3),
        "no tensor for .*layers.3",
    ),
    "more layers in the config": (with_config(text_config={"num_hidden_layers": 4}), "no tensor for .*layers.3"),
}

TAKEN: dict[str, Way] = {
    "nothing more": lambda folder: None,
    "a variant": with_weights("model.fp16.safetensors"),
    "what another tool wrote": with_weights("consolidated.safetensors"),
    "an adapter's weights alone": with_file("adapter_model.safetensors", "no adapter"),
    "subfolders": with_weights("original/model.safetensors", ".cache/huggingface/model.safetensors"),
    "a stale index": with_file(INDEX_FILE, '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'),
    "pickles": with_file("pytorch_model.bin", "no pickle"),
    "an index of pickles": with_file("pytorch_model.bin.index.json", '{"weight_map": {"a": "gone.bin"}}'),
    "shards": in_shards,
    "shards beside other weights": in_shards_beside_other_weights,
    "a shard that the index does not list": in_shards_with_one_unlisted,
    "names that no version reads from a config": with_config(key_mapping={"^language_model": "model"}),
    "names that an old class had": with_config(_checkpoint_conversion_mapping={"^language_model": "model"}),
    "another dtype": with_config(dtype="bfloat16"),
    "a dtype of the index that the config overrules": lambda folder: in_shards(folder, metadata={"dtype": "floaty"}),
    "words that begin and end texts": with_file(
        "generation_config.json",
        '{"eos_token_id": [2, 3], "bos_token_id": null, "pad_token_id": -1, "do_sample": true}',
    ),
    "a tied head that differs": with_config(tie_word_embeddings=True, text_config={"tie_word_embeddings": True}),
    "a buffer of an old version": with_tensors(
        lambda held: held.update({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    ),
    "positions of an old version": with_tensors(
        lambda held: held.update({"vision_tower.embeddings.position_ids": torch.arange(10)[None]})
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_would_be_loaded_otherwise_is_refused_by_name_before_any_work(model: Path, way: str) -> None:
    change, says = REFUSED[way]
    change(model)
    with pytest.raises(InputError, match=says) as error:
        family_of(Checkpoint.open(model))
    assert "\n" not in str(error.value) and str(model) in str(error.value)


def state(folder: Path) -> dict[str, Tensor]:
    """What plain transformers loads."""
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def projected(value: Tensor, basis: Tensor, axis: int) -> Tensor:
    """`value` without what it writes along `basis`, [1, d]; the axis of size d is `axis`."""
    turned = value.float().movedim(axis, -1)
    return (turned - (turned @ basis.T) @ basis).movedim(-1, axis)


@pytest.mark.parametrize("way", TAKEN)
def test_what_is_taken_is_what_plain_transformers_loads(model: Path, tmp_path: Path, way: str) -> None:
    TAKEN[way](model)
    before, out = state(model), tmp_path / "out"
    checkpoint = Checkpoint.open(model)
    check_loaded(checkpoint)
    family, basis = family_of(checkpoint), random_basis(1, 32)
    made = fold(Guard((SharedProjection(basis),)), family, checkpoint.shapes, checkpoint.read)
    out.mkdir()
    rewrite(checkpoint, family, made, out, lambda _count: None)
    copy_companions(model, out)
    folded = Checkpoint.open(out)
    assert inspect_folder(checkpoint, folded, family, made).passed
    axes = {writer.memory: writer.axis for writer in family.writers if writer.disk in made.edits}
    after = state(out)
    assert set(after) == set(before) and set(axes) < set(after)
    for name, value in before.items():
        wanted = projected(value, basis, axes[name]) if name in axes else value
        close = 1e-2 if value.dtype == torch.bfloat16 else 1e-5
        assert (after[name].float() - wanted).abs().max() <= (close * value.abs().max() if name in axes else 0), name
    kept = {path.name for path in out.iterdir()}
    assert not kept & {
        "adapter_model.safetensors",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "original",
    }


SAID_ALIKE = (
    *("a leftover adapter", "a layer's old and new name", "no head"),
    *("an index of a dtype of no number", "an encoder and a decoder", "no room for an answer"),
)


@pytest.mark.parametrize("way", SAID_ALIKE)
def test_inspect_says_what_export_and_extract_will(model: Path, guardfold: Command, tmp_path: Path, way: str) -> None:
    change, says = REFUSED[way]
    guard = tmp_path / "guard.safetensors"
    Guard((SublayerProjection({1: random_basis(1, 32)}),)).save(guard)
    change(model)
    out = tmp_path / "out"
    done = [
        guardfold("inspect", model, cwd=tmp_path),
        guardfold("export", "--model", model, "--guard", guard, "-o", out, cwd=tmp_path),
        guardfold("extract", "--model", model, "-o", tmp_path / "made.safetensors", cwd=tmp_path),
    ]
    assert {each.status for each in done} == {2} and len({each.complaint for each in done}) == 1
    with pytest.raises(InputError, match=says):
        raise InputError(done[0].complaint)
    assert not out.exists() and not (tmp_path / "made.safetensors").exists()


def test_a_model_with_a_leftover_adapter_is_not_run(model: Path) -> None:
    with_file("adapter_config.json")(model)
    for run in (lambda: load(model), lambda: meta_model(model), lambda: extract_guard(str(model), GuardOptions())):
        with pytest.raises(InputError, match=r"adapter_config\.json"):
            run()


KNOBS = Knobs()


def saved(name: str, folder: Path, knobs: Knobs = KNOBS, hub_style: bool = True) -> Path:
    specimen: Specimen = SPECIMENS[name]
    build(specimen, knobs, dtype=torch.float32).save_pretrained(folder, save_original_format=hub_style)
    return folder


def test_an_expert_under_two_names_is_refused_even_where_another_is_missing(tmp_path: Path) -> None:
    """Their number is right then, and so is the shape of what they are stacked to."""
    folder = saved("llava+qwen2_moe", tmp_path / "model")
    shapes = Checkpoint.open(folder).shapes
    one = next(name for name in sorted(shapes) if "layers.1." in name and "experts.0." in name)
    other = one.replace("language_model.model.", "model.language_model.")
    doubled = {name: shape for name, shape in shapes.items() if name != one.replace("experts.0.", "experts.1.")}
    faults = list(Layout(meta_model(folder), doubled | {other: shapes[one]}).faults())
    assert other != one and any(repr(one) in fault and repr(other) in fault for fault in faults)


FLAT = ("qwen2_vl", "qwen2_5_vl")


def flattened(folder: Path) -> Path:
    """The config as it was published: the text model's settings at the top."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    text.pop("model_type", None)
    path.write_text(json.dumps({**text, **config}))
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("change", ["shared", "widened"])
def test_a_flat_config_stays_flat(tmp_path: Path, name: str, tied: bool, change: str) -> None:
    nested = saved(name, tmp_path / "nested", Knobs(tied=tied))
    folder = flattened(Path(shutil.copytree(nested, tmp_path / "flat")))
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    basis = random_basis(1, family.width)
    gate = make_gate(family.width, 1, free=True, recycled=(), beta=64.0)
    guard = Guard((SharedProjection(basis) if change == "shared" else gate,))
    made = fold(guard, family, checkpoint.shapes, checkpoint.read)
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, family, made, tmp_path / "out", lambda _count: None)
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "out"))
    differing = {key for key in before | after if before.get(key) != after.get(key)}
    assert differing <= {"tie_word_embeddings", "intermediate_size"} and "text_config" not in after
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.config.text_config.hidden_size == family.width
    if change == "shared":
        assert not model.config.tie_word_embeddings
    else:
        assert model.config.text_config.intermediate_size == 256 + before["intermediate_size"]
    assert inspect_folder(checkpoint, Checkpoint.open(tmp_path / "out"), family, made).passed


def test_a_setting_that_stands_twice_is_changed_twice(tmp_path: Path) -> None:
    """Versions 4.52 to 4.56 wrote the text model's settings at the top as well."""
    folder = saved("qwen2_vl", tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", intermediate_size=text["intermediate_size"])
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    made = fold(Guard((make_gate(family.width, 1, free=True, recycled=()),)), family, checkpoint.shapes)
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, family, made, tmp_path / "out", lambda _count: None)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["intermediate_size"] == after["text_config"]["intermediate_size"] == 256 + text["intermediate_size"]


@pytest.mark.parametrize("name", ["llama4", "aria", "kimi_k25", "idefics"])
def test_mlps_that_cannot_grow_alone_are_said_before_the_work(tmp_path: Path, name: str) -> None:
    folder = saved(name, tmp_path / "model")
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    with pytest.raises(InputError, match=r"cannot grow alone: with intermediate_size = .*; use --placement recycle"):
        check_new_model(checkpoint, family, widened(family, checkpoint.shapes))
    gate = make_gate(family.width, max(family.mlps), free=True, recycled=(), beta=64.0)
    made = fold(Guard((gate,)), family, checkpoint.shapes)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="use --placement recycle"):
        rewrite(checkpoint, family, made, tmp_path / "out", lambda _count: None)
    assert not list((tmp_path / "out").iterdir())


def test_a_preset_that_would_widen_what_cannot_be_is_refused_before_the_model_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama4", tmp_path / "model")
    with pytest.raises(InputError, match="use --placement recycle"):
        extract_guard(str(folder), GuardOptions(guard="gate", placement="widen"))


def everything(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from everything(inner)


def test_a_config_is_written_as_it_was_read(tmp_path: Path) -> None:
    folder = Tiny(tied=True).save(tmp_path / "model", processor=False)
    change_json(folder / "config.json", more={"not": ["known", None]}, torch_dtype="float32")
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    made = fold(Guard((SharedProjection(random_basis(1, 32)),)), family, checkpoint.shapes)
    (tmp_path / "out").mkdir()
    rewrite(checkpoint, family, made, tmp_path / "out", lambda _count: None)
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "out"))
    for config in (before, after):
        for each in (config, config["text_config"]):
            each.pop("tie_word_embeddings")
    assert before == after and "known" in list(everything(after))
