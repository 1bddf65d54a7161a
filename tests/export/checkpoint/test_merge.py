"""A user's adapter merged tensor by tensor: equal to what PEFT's own merge makes of the whole model, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import loaded, saved, tuned
from safetensors.torch import load_file, save_file
from zoo import Tiny

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.merge import CONFIG_FILE, WEIGHTS_FILE, merging
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import family_of
from guardfold.guard.base.errors import InputError

LANGUAGE = r".*language_model.*\."
PATTERNS = {"rank_pattern": {r"layers.1.self_attn.o_proj": 5}, "alpha_pattern": {r"layers.0.self_attn.o_proj": 3}}
MERGED: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LANGUAGE + "(q_proj|o_proj|down_proj)"},
    "listed": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    "rslora, patterns": {"target_modules": LANGUAGE + "o_proj", "use_rslora": True, **PATTERNS},
    "dora": {"target_modules": LANGUAGE + "(o_proj|embed_tokens)", "use_dora": True},
    "embedding": {"target_modules": LANGUAGE + "(o_proj|embed_tokens)"},
    "biases": {"target_modules": r".*linear_2", "lora_bias": True},
    "kept whole": {"target_modules": LANGUAGE + "o_proj", "modules_to_save": ["multi_modal_projector", "lm_head"]},
}
EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}
DOWN: dict[str, Any] = {"target_modules": LANGUAGE + "o_proj", "target_parameters": ["experts.down_proj"]}
CASES = [
    *[("llava+llama", "hub", what, MERGED[what]) for what in MERGED],
    *[("llava+llama", "memory", what, MERGED[what]) for what in ("plain", "listed", "rslora, patterns")],
    *[(name, "hub", "experts", EXPERTS) for name in ("aria", "qwen3_vl_moe", "llama4")],
    ("glm4v_moe", "hub", "experts, one tensor each", DOWN),
]


def merged(checkpoint: Checkpoint, adapter: Path, to: Path) -> Any:
    to.mkdir()
    made = merging(checkpoint, family_of(checkpoint), adapter)
    rewrite(checkpoint, family_of(checkpoint), made, to, lambda _count: None)
    return loaded(to, torch.float32)


@pytest.mark.parametrize(
    ("name", "style", "settings"), [(n, s, c) for n, s, _, c in CASES], ids=[f"{n}-{s}-{w}" for n, s, w, _ in CASES]
)
def test_merging_equals_pefts_own(name: str, style: str, settings: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = saved(name, style, tmp_path / "base")
    theirs = tuned(checkpoint.folder, tmp_path / "adapter", **settings).merge_and_unload().state_dict()
    ours = merged(checkpoint, tmp_path / "adapter", tmp_path / "merged").state_dict()
    before = loaded(checkpoint.folder).state_dict()
    assert set(ours) == set(theirs)
    changed = 0
    for key, tensor in theirs.items():
        assert (ours[key] - tensor).abs().max() <= 1e-6 * (1 + tensor.abs().max()), key
        changed += not torch.equal(before[key], tensor)
        if torch.equal(before[key], tensor):
            assert torch.equal(before[key], ours[key]), key
    assert changed


def test_names_of_older_transformers_are_understood(tmp_path: Path) -> None:
    checkpoint = saved("llava+llama", "hub", tmp_path / "base")
    theirs = tuned(checkpoint.folder, tmp_path / "adapter", **MERGED["listed"]).merge_and_unload().state_dict()
    path = tmp_path / "adapter" / WEIGHTS_FILE
    old = {
        key.replace("model.model.language_model.", "model.language_model.model."): t
        for key, t in load_file(path).items()
    }
    save_file(old, path)
    ours = merged(checkpoint, tmp_path / "adapter", tmp_path / "merged").state_dict()
    assert all(torch.allclose(ours[key], tensor, atol=1e-6) for key, tensor in theirs.items())


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    tuned(saved("llava+llama", "hub", folder / "base").folder, folder / "adapter", **MERGED["plain"])
    return folder


def refused(fine_tune: Path, work: Path, config: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> str:
    """What is said of the adapter after `config` and `change`, of its tensors, have been applied."""
    shutil.copytree(fine_tune / "adapter", work / "adapter")
    path = work / "adapter" / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    held = load_file(work / "adapter" / WEIGHTS_FILE)
    change(held)
    save_file(held, work / "adapter" / WEIGHTS_FILE)
    checkpoint = Checkpoint.open(fine_tune / "base")
    with pytest.raises(InputError) as error:
        merging(checkpoint, family_of(checkpoint), work / "adapter")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is set"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set"),
        ({"use_tomorrow": True}, "unknown setting 'use_tomorrow'"),
        ({"target_modules": ["no_such_module"]}, "PEFT cannot put it on"),
        ({"r": 0}, "PEFT cannot put it on"),
        ({"r": 3}, "has shape"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused_by_name(
    config: dict[str, Any], said: str, fine_tune: Path, tmp_path: Path
) -> None:
    assert said in refused(fine_tune, tmp_path, config, lambda _held: None)


def spoil(held: dict[str, torch.Tensor]) -> None:
    held[min(held)][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: held.pop(min(held)), "no tensor 'base_model.model."),
        (lambda held: held.update({"base_model.model.more.lora_A.weight": torch.ones(2, 2)}), "belongs to nothing"),
        (lambda held: held.update({min(held): held[min(held)].to(torch.int32)}), "only floats"),
        (lambda held: held.update({min(held): held[min(held)][:, :-1].contiguous()}), "has shape"),
        (spoil, "NaN"),
    ],
)
def test_unsound_tensors_are_refused_by_name(
    change: Callable[[dict[str, Any]], object], said: str, fine_tune: Path, tmp_path: Path
) -> None:
    assert said in refused(fine_tune, tmp_path, {}, change)


def test_a_pickled_or_broken_adapter_is_never_opened(fine_tune: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(fine_tune / "base")
    family = family_of(checkpoint)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        merging(checkpoint, family, fine_tune / "base")
    broken = Path(shutil.copytree(fine_tune / "adapter", tmp_path / "adapter"))
    (broken / WEIGHTS_FILE).rename(broken / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled adapters"):
        merging(checkpoint, family, broken)
    (broken / WEIGHTS_FILE).write_bytes(b"\x10" + bytes(20))
    with pytest.raises(InputError, match=WEIGHTS_FILE):
        merging(checkpoint, family, broken)
    (broken / WEIGHTS_FILE).unlink()
    (broken / WEIGHTS_FILE).symlink_to(fine_tune / "adapter" / WEIGHTS_FILE)
    with pytest.raises(InputError, match="leads outside"):
        merging(checkpoint, family, broken)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("embedding", "which the head of llava is tied to"),
        ("kept whole", "no tensor of its own"),
        ("biases", "no tensor of its own"),
    ],
)
def test_what_a_tied_or_biasless_base_cannot_take_is_refused(what: str, said: str, tmp_path: Path) -> None:
    checkpoint = saved("llava+llama", "memory", tmp_path / "base")
    tuned(checkpoint.folder, tmp_path / "adapter", **MERGED[what])
    with pytest.raises(InputError, match=said):
        merging(checkpoint, family_of(checkpoint), tmp_path / "adapter")


def test_experts_joined_on_loading_are_refused(tmp_path: Path) -> None:
    checkpoint = saved("glm4v_moe", "hub", tmp_path / "base")
    tuned(checkpoint.folder, tmp_path / "adapter", **EXPERTS)
    with pytest.raises(InputError, match=r"gate_up_proj, which .* keeps in a form it is not merged into"):
        merging(checkpoint, family_of(checkpoint), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """As far from the exact sum as half a unit in the last place, which adding in the narrow dtype is not."""
    folder = Tiny(dtype=dtype).save(tmp_path / "base")
    exact = tuned(folder, tmp_path / "adapter", **MERGED["plain"]).merge_and_unload().state_dict()
    checkpoint = Checkpoint.open(folder)
    ours = merged(checkpoint, tmp_path / "adapter", tmp_path / "merged").state_dict()
    assert all(
        torch.equal(ours[key], tensor.to(dtype).float()) for key, tensor in exact.items() if tensor.is_floating_point()
    )
