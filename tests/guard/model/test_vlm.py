"""From a name to a model: what is found, what is refused, and what the parts of a model are."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import Tiny, change_tensors

from guardfold.guard.base.errors import InputError
from guardfold.guard.model import vlm as module
from guardfold.guard.model.roles import decoder_layers, final_norm, residual_readers, sublayers
from guardfold.guard.model.vlm import VLM, check_weights, load, resolve


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_the_demo_and_folders_are_found_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, name = resolve("demo")
    assert name == "demo"
    assert (demo / "model.safetensors").is_file()
    assert resolve(str(folder)) == (folder, "model")
    monkeypatch.chdir(folder)
    assert resolve(".") == (Path(), "model")


@pytest.mark.parametrize("name", ["absent", "./owner/name", "/absent/name", "a/b/c", "~/model"])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such folder; give a model folder, a hub id") as error:
        resolve(name)
    assert name in str(error.value)


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^owner/name: cannot be had from the Hugging Face Hub") as error:
        resolve("owner/name")
    assert "\n" not in str(error.value)


def test_a_model_is_loaded_with_its_processor_padding_on_the_left(tiny: VLM) -> None:
    assert (tiny.width, len(tiny.layers), tiny.model.dtype) == (32, 3, torch.float32)
    assert not tiny.model.training
    processor: Any = tiny.processor
    assert processor.tokenizer.padding_side == "left"
    assert torch.equal(tiny.model.state_dict()["lm_head.weight"], Tiny().model().state_dict()["lm_head.weight"])


def test_parts_are_found_by_role(tiny: VLM) -> None:
    text: Any = tiny.model.model.language_model
    assert decoder_layers(tiny.model) == list(text.layers)
    assert sublayers(text.layers[1]) == {"self_attn": text.layers[1].self_attn, "mlp": text.layers[1].mlp}
    assert final_norm(tiny.model) is text.norm
    expected = [norm for layer in text.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    assert residual_readers(tiny.model) == [*expected, text.norm]
    headless: Any = copy.deepcopy(tiny.model)
    del headless.model.language_model.norm
    with pytest.raises(InputError, match="has none of the modules"):
        final_norm(headless)


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def bare(folder: Path) -> None:
    """Leaves config and weights alone."""
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no .*safetensors weights"),
    "pickled weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "only pickled weights",
    ),
    "a text model": (configured(model_type="qwen2"), "'qwen2' is not a vision-language model"),
    "a config of no model": (configured(text_config=5), "cannot load it"),
    "a config of another size": (configured(vision_config={"model_type": "clip_vision_model", "patch_size": 0}), ""),
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"oops"), "cannot load it"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load its processor|no tokenizer"),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{oops"), "cannot load its processor"),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
    "no processor": (bare, "processor"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_by_name(folder: Path, kind: str) -> None:
    change, says = BROKEN[kind]
    change(folder)
    with pytest.raises(InputError, match=says) as error:
        load(folder, "cpu")
    assert str(folder) in str(error.value)


def test_a_pickle_beside_the_weights_is_not_opened(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    check_weights(folder)
    assert load(folder, "cpu").width == 32


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder: Path) -> None:
    change_tensors(folder, lambda held: held.pop("language_model.model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(InputError):
        load(folder, "cpu")


@pytest.mark.parametrize(("left", "batch"), [(2**40, 64), (2**23, 2), (2**21, 1), (0, 1)])
def test_a_batch_takes_no_more_than_is_left_of_the_memory(
    tiny: VLM, monkeypatch: pytest.MonkeyPatch, left: int, batch: int
) -> None:
    """A prompt of the tiny model is taken to need 4 * 1024 * (32 * (2 * 3 + 16) + vocabulary) bytes, some 3 MB."""
    monkeypatch.setattr(module, "free_memory", lambda: left)
    assert VLM(tiny.model, tiny.processor, tiny.folder).batch_size == batch
