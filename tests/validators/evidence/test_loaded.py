"""What plain transformers loads is compared value by value: no one of them may be skipped, and no two taken for one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from zoo import Tiny, change_json, change_tensors, random_basis, tensors

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.layout import Layout, Stored
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import Family, family_of
from guardfold.export.fold import Fold, fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.validators.evidence import loaded
from guardfold.validators.evidence.integrity import inspect_folder
from guardfold.validators.evidence.loaded import check_loaded, compare_loaded

OLD, NEW = "language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(params=["kept", "dropped"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small models keep their values, large ones drop each when it was compared; here both are tried on small ones."""
    if request.param == "dropped":
        monkeypatch.setattr(loaded, "KEEP_BELOW_BYTES", 0)
    return request.param


def bent(checkpoint: Checkpoint, *bend: str) -> Checkpoint:
    """The checkpoint as a reader sees it who takes one bit of each of the tensors `bend` for another."""

    class Bent(Checkpoint):
        def read_bytes(self, name: str, first: int, last: int) -> bytearray:
            data = super().read_bytes(name, first, last)
            if name in bend and first == 0:
                data[0] ^= 1
            return data

    return Bent(checkpoint.folder, checkpoint.config, checkpoint.shards, checkpoint.index)


def test_all_that_transformers_loads_is_compared(tiny_folder: Path, size: str) -> None:
    checkpoint = Checkpoint.open(tiny_folder)
    found = compare_loaded(checkpoint)
    model: Any = AutoModelForImageTextToText.from_pretrained(tiny_folder)
    assert found.failures == () and found.count == len(model.state_dict()) == len(checkpoint.tensors)


def test_no_tensor_may_be_read_otherwise(tiny_folder: Path, size: str) -> None:
    checkpoint = Checkpoint.open(tiny_folder)
    wrong = compare_loaded(bent(checkpoint, *checkpoint.tensors)).failures
    assert {failure.rpartition(" ")[2] for failure in wrong} == set(checkpoint.tensors)
    name = max(checkpoint.tensors)
    with pytest.raises(InputError, match=f"{tiny_folder}: transformers does not load .* as it lies in {name}"):
        check_loaded(bent(checkpoint, name))


@pytest.mark.parametrize("name", [OLD, "vision_tower.pre_layrnorm.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_named(model: Path, name: str, value: float, size: str) -> None:
    change_tensors(model, lambda held: held[name].view(-1)[-1].fill_(value))
    with pytest.raises(InputError, match=f"transformers loads NaN or Inf from {name} as torch.float32"):
        check_loaded(Checkpoint.open(model))


def test_what_is_no_number_after_the_cast_is_named(model: Path, size: str) -> None:
    change_tensors(model, lambda held: held[OLD].view(-1)[0].fill_(1e6))
    assert compare_loaded(Checkpoint.open(model)).failures == ()
    change_json(model / "config.json", dtype="float16")
    (failure,) = compare_loaded(Checkpoint.open(model)).failures
    assert failure == f"transformers loads NaN or Inf from {OLD} as torch.float16"


def test_no_value_may_be_left_out(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, watch = Checkpoint.open(tiny_folder), loaded._each_given
    monkeypatch.setattr(loaded, "KEEP_BELOW_BYTES", 0)
    for left_out in ("lm_head.weight", "model.vision_tower.pre_layrnorm.weight", NEW):

        @contextmanager
        def skipping(kind: type, take: Callable[[str, Tensor], Tensor | None], but: str = left_out) -> Iterator[None]:
            with watch(kind, lambda name, value: None if name == but else take(name, value)):
                yield

        monkeypatch.setattr(loaded, "_each_given", skipping)
        assert f"transformers never loads {left_out}" in compare_loaded(checkpoint).failures


def test_a_reader_who_takes_the_other_of_two_names_is_found_out(
    model: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """As it was: of a parameter's old and new name transformers took the one, and the fold the other."""
    change_tensors(model, lambda held: held.update({NEW: held[OLD] + 1}))
    with pytest.raises(InputError, match="are both"):
        check_loaded(Checkpoint.open(model))
    monkeypatch.setattr(Layout, "check", lambda self, checkpoint: None)
    assert compare_loaded(Checkpoint.open(model)).failures == ()

    def last(self: Layout, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
        self.stored[name], self.shapes[name] = stored, shape

    monkeypatch.setattr(Layout, "_store", last)
    (failure,) = compare_loaded(Checkpoint.open(model)).failures
    assert failure == f"transformers does not load {NEW} as it lies in {NEW}"


def test_no_block_of_a_tensor_may_differ(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setattr(loaded, "COMPARE_BYTES", 256)  # a row or two
    (failure,) = compare_loaded(bent(Checkpoint.open(tiny_folder), OLD)).failures
    assert failure.endswith(OLD)


def test_what_transformers_reports_is_a_failure(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_tensors(model, lambda held: held.pop(OLD))
    monkeypatch.setattr(Layout, "check", lambda self, checkpoint: None)
    assert f"transformers reports missing_keys: {NEW}" in compare_loaded(Checkpoint.open(model)).failures


def loading(change: Callable[[Any], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets from_pretrained end with what `change` makes of the model."""

    class Changed:
        @staticmethod
        def from_pretrained(*arguments: Any, **options: Any) -> tuple[nn.Module, Any]:
            found: Any = AutoModelForImageTextToText.from_pretrained(*arguments, **options)
            return change(found[0]), found[1]

    monkeypatch.setattr(loaded, "auto_class", lambda config: Changed)


def test_a_head_that_is_not_tied_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tiny(tied=True).save(tmp_path / "model", processor=False)

    def untied(made: Any) -> nn.Module:
        made.lm_head.weight = nn.Parameter(made.lm_head.weight.detach().clone())
        return made

    loading(untied, monkeypatch)
    (failure,) = compare_loaded(Checkpoint.open(tmp_path / "model")).failures
    assert failure.startswith("transformers does not tie lm_head.weight to ")


def test_another_class_is_found_out(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading(lambda made: made.model, monkeypatch)
    (failure,) = compare_loaded(Checkpoint.open(tiny_folder)).failures
    assert failure == "transformers loads a LlavaModel, not a LlavaForConditionalGeneration"


def test_a_folder_that_holds_more_than_is_read_is_found_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was: transformers put the adapter on the model, and the fold did not."""
    from peft import LoraConfig, get_peft_model

    plain: Any = AutoModelForImageTextToText.from_pretrained(model)
    adapted: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(model))
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        Checkpoint.open(model)
    monkeypatch.setattr("guardfold.guard.model.vlm.check_loading", lambda folder, config: None)
    (failure,) = compare_loaded(Checkpoint.open(model)).failures
    assert "other parts" in failure and "down_proj" in failure


def test_weights_named_elsewhere_are_found_out(model: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    other = {name: each + 1 if each.is_floating_point() else each for name, each in tensors(model).items()}
    save_file(other, model / "other.safetensors", {"format": "pt"})
    change_json(model / "config.json", transformers_weights="other.safetensors")
    monkeypatch.setattr("guardfold.guard.model.vlm.check_loading", lambda folder, config: None)
    assert len(compare_loaded(Checkpoint.open(model)).failures) == len(other)


def folded(model: Path, target: Path, scope: str = "sublayers") -> tuple[Checkpoint, Checkpoint, Family, Fold]:
    source = Checkpoint.open(model)
    family, basis = family_of(source), random_basis(1, 32)
    guard = Guard((SublayerProjection({1: basis}) if scope == "sublayers" else SharedProjection(basis),))
    made = fold(guard, family, source.shapes, source.read)
    target.mkdir()
    rewrite(source, family, made, target, lambda _count: None)
    return source, Checkpoint.open(target), family, made


def flip(folder: Path, name: str, place: int) -> None:
    shard, info = Checkpoint.open(folder).tensors[name]
    with shard.path.open("r+b") as file:
        file.seek(shard.data_start + info.begin + place)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_bit_of_any_untouched_tensor_is_seen(tiny_folder: Path, tmp_path: Path, size: str) -> None:
    source, made, family, edits = folded(tiny_folder, tmp_path / "out")
    assert inspect_folder(source, made, family, edits).failures == ()
    untouched = set(made.tensors) - edits.changed
    for name in untouched:
        flip(made.folder, name, made.info(name).end - made.info(name).begin - 1)
    found = inspect_folder(source, Checkpoint.open(made.folder), family, edits)
    assert set(found.failures) == {f"{name} should be untouched but differs" for name in untouched}


def test_a_bit_that_a_cast_would_hide_is_seen(model: Path, tmp_path: Path, size: str) -> None:
    change_json(model / "config.json", dtype="bfloat16")
    source, made, family, edits = folded(model, tmp_path / "out")
    assert inspect_folder(source, made, family, edits).passed
    flip(made.folder, OLD, 0)
    found = inspect_folder(source, Checkpoint.open(made.folder), family, edits)
    assert found.failures == (f"{OLD} should be untouched but differs",)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_tied_and_untied_are_compared(tmp_path: Path, tied: bool, size: str) -> None:
    Tiny(tied=tied).save(tmp_path / "model", processor=False)
    source, made, family, edits = folded(tmp_path / "model", tmp_path / "out", "shared")
    assert edits.untie == tied
    for each in (source, made):
        assert compare_loaded(each).failures == ()
    assert inspect_folder(source, made, family, edits).failures == ()


def test_shards_and_stacked_experts_are_compared(tmp_path: Path, size: str) -> None:
    from specimens import Knobs, build
    from specimens.known import KNOWN

    specimen = next(each for each in KNOWN if each.name == "llava+qwen2_moe")
    build(specimen, Knobs(), dtype=torch.float32).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    checkpoint = Checkpoint.open(tmp_path / "model")
    found = compare_loaded(checkpoint, {name: (checkpoint, name) for name in checkpoint.tensors})
    assert len(checkpoint.shards) > 2 and found.failures == () and found.copies == set(checkpoint.tensors)
    expert = next(name for name in checkpoint.tensors if "experts.2." in name)
    (failure,) = compare_loaded(bent(checkpoint, expert)).failures
    assert ".mlp.experts." in failure
    other = bent(checkpoint, expert)
    found = compare_loaded(checkpoint, {name: (other, name) for name in checkpoint.tensors})
    assert found.failures == () and expert not in found.copies


def test_hooks_are_gone_and_the_environment_is_as_it_was(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loaded.NO_LOADING_AHEAD, raising=False)
    monkeypatch.setattr(loaded, "KEEP_BELOW_BYTES", 0)
    compare_loaded(Checkpoint.open(tiny_folder))
    assert loaded.NO_LOADING_AHEAD not in os.environ
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.ones(2, 2))
    assert not module.weight.is_meta


MEASURE = """
import sys
from pathlib import Path
import torch
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.validators.evidence import loaded

def peak():
    Path("/proc/self/clear_refs").write_text("5")
    return lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

torch.set_num_threads(1)
loaded.KEEP_BELOW_BYTES, loaded.LET_GO_BYTES = 0, 2**23
small, large = (Checkpoint.open(Path(each)) for each in sys.argv[1:])
assert not loaded.compare_loaded(small).failures  # whatever is imported is imported now
now = peak()
before = now()
assert not loaded.compare_loaded(large).failures
print(now() - before, large.data_bytes >> 20)
"""


def test_memory_does_not_grow_with_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    large = Tiny(width=1024, layers=8, heads=8, bias=False).save(tmp_path / "large", processor=False)
    command = [sys.executable, "-c", MEASURE, str(tiny_folder), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    assert held > 80 and grown < held / 2


def test_a_folder_that_transformers_cannot_load_is_an_error_of_one_line(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="transformers cannot load it") as error:
        check_loaded(checkpoint)
    assert "\n" not in str(error.value)
