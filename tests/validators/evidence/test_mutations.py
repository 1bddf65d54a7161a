"""The validators see what they are there for: one writer forgotten, one byte changed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import Tiny, change_tensors, random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import Family, family_of
from guardfold.export.fold import Fold, fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.guard.presets.layers import Scope
from guardfold.validators.evidence.equivalence import Equivalence, compare
from guardfold.validators.evidence.integrity import inspect_folder

TEXT, PROJECTOR = "language_model.model.", "multi_modal_projector.linear_2."
SHARED = [
    TEXT + "embed_tokens.weight",
    PROJECTOR + "weight",
    PROJECTOR + "bias",
    "image_newline",
    TEXT + "layers.0.mlp.down_proj.weight",
    TEXT + "layers.2.mlp.down_proj.bias",
    TEXT + "layers.0.self_attn.o_proj.weight",
    TEXT + "layers.1.self_attn.o_proj.bias",
]
OWN = [name for name in SHARED if "layers" in name]


@dataclass(frozen=True)
class Bench:
    """A checkpoint, a guard, and the fold of one into the other."""

    source: Checkpoint
    family: Family
    guard: Guard
    fold: Fold

    def written(self, target: Path, fold: Fold) -> Checkpoint:
        target.mkdir()
        rewrite(self.source, self.family, fold, target, lambda _: None)
        return Checkpoint.open(target)

    def without(self, name: str) -> Fold:
        assert name in self.fold.edits
        return replace(self.fold, edits={key: edits for key, edits in self.fold.edits.items() if key != name})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scope, torch.dtype], Bench]:
    @cache
    def make(scope: Scope, dtype: torch.dtype) -> Bench:
        folder = Tiny("llava_next", dtype=dtype).save(tmp_path_factory.mktemp("mutations") / "model")
        source = Checkpoint.open(folder)
        family, basis = family_of(source), random_basis(2, 32)
        guard = Guard(
            (SharedProjection(basis) if scope == "shared" else SublayerProjection(dict.fromkeys(range(3), basis)),)
        )
        return Bench(source, family, guard, fold(guard, family, source.shapes))

    return make


def unequal(found: Equivalence) -> bool:
    """Whether the file is seen not to be its hooks: by logits, or entry by entry."""
    return any("differ by" in line or "units in the last place" in line for line in found.failures)


def leaks(found: Equivalence) -> tuple[bool, bool]:
    """Whether activations carry the direction, and whether a tensor keeps it."""
    return any("still carries" in line for line in found.failures), any("keeps" in line for line in found.failures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["shared", "sublayers"])
def test_a_whole_fold_passes(tmp_path: Path, bench: Any, scope: Scope, dtype: torch.dtype) -> None:
    made = bench(scope, dtype)
    found = compare(made.source, made.written(tmp_path / "whole", made.fold), made.guard, made.fold)
    assert found.failures == ()
    assert found.edit > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scope", "name"), [("shared", name) for name in SHARED] + [("sublayers", name) for name in OWN]
)
def test_a_forgotten_writer_is_seen_by_logits_activations_and_tensors(
    tmp_path: Path, bench: Any, scope: Scope, name: str, dtype: torch.dtype
) -> None:
    made = bench(scope, dtype)
    folded = made.written(tmp_path / "mutant", made.without(name))
    found = compare(made.source, folded, made.guard, made.fold)
    assert unequal(found) and found.misplaced == name
    assert leaks(found) == (True, True)
    assert found.worst_tensor == name
    assert name in " ".join(found.failures)


def test_a_projection_at_half_its_strength_is_seen(tmp_path: Path, bench: Any) -> None:
    made = bench("sublayers", torch.float32)
    half = Guard((SublayerProjection(made.guard.interventions[0].bases, 0.5),))
    folded = made.written(tmp_path / "half", fold(half, made.family, made.source.shapes))
    found = compare(made.source, folded, made.guard, made.fold)
    assert unequal(found)
    assert leaks(found) == (True, True)


def test_a_direction_that_is_slightly_off_is_seen(tmp_path: Path, bench: Any) -> None:
    made = bench("shared", torch.float32)
    basis = torch.linalg.qr((random_basis(2, 32) + 1e-3 * random_basis(2, 32, 9)).T).Q.T.contiguous()
    folded = made.written(tmp_path / "off", fold(Guard((SharedProjection(basis),)), made.family, made.source.shapes))
    found = compare(made.source, folded, made.guard, made.fold)
    assert unequal(found)
    assert leaks(found)[0]


def test_a_head_that_follows_the_edited_embedding_is_seen(tmp_path: Path) -> None:
    folder = Tiny(tied=True).save(tmp_path / "model")
    source = Checkpoint.open(folder)
    family, guard = family_of(source), Guard((SharedProjection(random_basis(2, 32)),))
    whole = fold(guard, family, source.shapes)
    bench = Bench(source, family, guard, whole)
    assert compare(source, bench.written(tmp_path / "whole", whole), guard, whole).passed
    with pytest.raises(InputError, match="no tensor for lm_head"):
        compare(source, bench.written(tmp_path / "mutant", replace(whole, untie=False)), guard, whole)


def edited_bytes(folder: Path, name: str, place: int) -> None:
    """Flips the lowest bit of one byte of the tensor `name`."""
    checkpoint = Checkpoint.open(folder)
    shard, info = checkpoint.tensors[name]
    offset = shard.data_start + info.begin + place % (info.end - info.begin)
    with shard.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


UNTOUCHED = [
    "language_model.lm_head.weight",
    "vision_tower.embeddings.class_embedding",
    TEXT + "layers.1.mlp.up_proj.weight",
    TEXT + "norm.weight",
]


@pytest.mark.parametrize("place", [0, 17, -1])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_one_bit_of_an_untouched_tensor_is_seen_and_named(tmp_path: Path, bench: Any, name: str, place: int) -> None:
    made = bench("shared", torch.float32)
    folded = made.written(tmp_path / "folded", made.fold)
    assert inspect_folder(made.source, folded, made.family, made.fold).failures == ()
    edited_bytes(folded.folder, name, place)
    found = inspect_folder(made.source, Checkpoint.open(folded.folder), made.family, made.fold)
    assert found.failures == (f"{name} should be untouched but differs",)


def test_a_head_that_is_not_the_original_embedding_is_seen(tmp_path: Path) -> None:
    source = Checkpoint.open(Tiny(tied=True).save(tmp_path / "model"))
    family, guard = family_of(source), Guard((SharedProjection(random_basis(2, 32)),))
    made = Bench(source, family, guard, fold(guard, family, source.shapes))
    folded = made.written(tmp_path / "folded", made.fold)
    assert inspect_folder(source, folded, family, made.fold).passed
    edited_bytes(folded.folder, family.untied_head, 5)
    found = inspect_folder(source, Checkpoint.open(folded.folder), family, made.fold)
    assert found.failures == (f"{family.untied_head} should be untouched but differs",)


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda held: held.update({new: held.pop(old)})


TABLES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "missing": (lambda held: held.pop(UNTOUCHED[2]), [f"{UNTOUCHED[2]} is missing"]),
    "one too many": (lambda held: held.update(extra=torch.ones(2)), ["extra does not belong"]),
    "renamed": (
        rename(UNTOUCHED[2], TEXT + "layers.1.mlp.upproj.weight"),
        [f"{UNTOUCHED[2]} is missing", f"{TEXT}layers.1.mlp.upproj.weight does not belong"],
    ),
    "another dtype": (
        lambda held: held.update({UNTOUCHED[3]: held[UNTOUCHED[3]].half()}),
        [f"{UNTOUCHED[3]} is F16 [32], "],
    ),
    "another shape": (
        lambda held: held.update({TEXT + "embed_tokens.weight": held[TEXT + "embed_tokens.weight"][:-1]}),
        [f"{TEXT}embed_tokens.weight is F32 [35, 32], "],
    ),
}


@pytest.mark.parametrize("change", TABLES)
def test_another_table_of_tensors_is_seen_and_named(tmp_path: Path, bench: Any, change: str) -> None:
    edit, says = TABLES[change]
    made = bench("sublayers", torch.float32)
    folder = made.written(tmp_path / "folded", made.fold).folder
    change_tensors(folder, edit)
    found = inspect_folder(made.source, Checkpoint.open(folder), made.family, made.fold)
    assert not found.passed
    assert all(any(line.startswith(said) for line in found.failures) for said in says), found.failures


def test_a_config_that_describes_another_model_is_seen(tmp_path: Path, bench: Any) -> None:
    made = bench("sublayers", torch.float32)
    folder = made.written(tmp_path / "folded", made.fold).folder
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_folder(made.source, Checkpoint.open(folder), made.family, made.fold)
    assert any("no tensor for" in line for line in found.failures)


def test_a_file_cut_short_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    folder = Tiny().save(tmp_path / "model")
    source = Checkpoint.open(folder)
    family, guard = family_of(source), Guard((SublayerProjection({0: random_basis(1, 32)}),))
    made = Bench(source, family, guard, fold(guard, family, source.shapes))
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    with pytest.raises(InputError, match="cut short while being read"):
        made.written(tmp_path / "folded", made.fold)


def test_the_header_is_kept_as_it_is_even_if_it_was_written_by_another_hand(tmp_path: Path) -> None:
    """Spaces, order and metadata of a header belong to whoever wrote it."""
    folder = Tiny().save(tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    entries["__metadata__"] = {"made": "elsewhere", "format": "pt"}
    header = json.dumps(dict(reversed(entries.items())), indent=1).encode() + b"   "
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    source = Checkpoint.open(folder)
    family, guard = family_of(source), Guard((SublayerProjection({0: random_basis(1, 32)}),))
    made = Bench(source, family, guard, fold(guard, family, source.shapes))
    folded = made.written(tmp_path / "folded", made.fold)
    assert folded.shards[0].header == header
    assert inspect_folder(source, folded, family, made.fold).passed
