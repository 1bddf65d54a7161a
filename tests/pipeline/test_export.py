"""An exported folder, loaded by plain transformers, is the original with the guard's hooks, and nothing else."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from covering import covering
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from zoo import Tiny, corners, name_of, random_basis, tensors, variations

from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.guard.presets.layers import Scope
from guardfold.pipeline import Export, GuardOptions, export_guarded

SHARDS = "20KB"


@dataclass(frozen=True)
class Case:
    """One model as it lies on disk, and the guard that is folded into it."""

    shape: Tiny
    scope: Scope
    legacy: bool = True
    sharded: bool = False
    strength: float = 1.0

    @property
    def basis(self) -> Tensor:
        return random_basis(2, self.shape.width, 5)

    @property
    def bases(self) -> dict[int, Tensor]:
        return {0: random_basis(1, self.shape.width, 6), 2: random_basis(3, self.shape.width, 7)}

    @property
    def guard(self) -> Guard:
        if self.scope == "shared":
            return Guard((SharedProjection(self.basis, self.strength),))
        return Guard((SublayerProjection(self.bases, self.strength),))

    def hooks(self, model: Any) -> AbstractContextManager[None]:
        if self.scope == "shared":
            return reference.projected_stream(model, self.basis, self.strength)
        return reference.projected_sublayers(model, self.bases, self.strength)

    def projected(self, name: str, before: Tensor) -> Tensor | None:
        """What the tensor `name` on disk must become, in float64; None if it must stay as it is."""
        layer = re.search(r"language_model.*layers\.(\d+)\.(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)$", name)
        outer = re.search(r"embed_tokens\.weight$|multi_modal_projector\.linear_2\.(weight|bias)$|image_newline$", name)
        if self.scope == "shared":
            basis = self.basis if layer or outer else None
        else:
            basis = self.bases.get(int(layer[1])) if layer else None
        if basis is None:
            return None
        weight, basis = before.double(), basis.double()
        if name.endswith("embed_tokens.weight"):
            return weight - self.strength * (weight @ basis.T) @ basis
        return weight - self.strength * basis.T @ (basis @ weight)

    def __str__(self) -> str:
        dtype = str(self.shape.dtype).removeprefix("torch.")
        style = "hub" if self.legacy else "memory"
        return f"{name_of(self.shape)}-{dtype}-{self.scope}-{style}-{'shards' if self.sharded else 'whole'}"


LAYOUTS = tuple(itertools.product((True, False), repeat=2))
"""Whether names are the hub's, and whether the weights are in shards."""
FOLDED: tuple[Scope, ...] = ("shared", "sublayers")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


PROPERTIES: dict[str, Callable[[Case], object]] = {
    "family": lambda case: case.shape.family,
    "text": lambda case: case.shape.text,
    "tied": lambda case: case.shape.tied,
    "layout": lambda case: (case.legacy, case.sharded),
    "scope": lambda case: case.scope,
    "dtype": lambda case: case.shape.dtype,
}
TOGETHER = [
    *itertools.combinations(PROPERTIES, 2),
    *[("family", "text", "scope"), ("tied", "layout", "scope"), ("family", "layout", "scope")],
]
"""Properties of which all combinations are tried. Where an embedding is untied, the name of the head, its shard and its
line in the index depend on three of them.
"""


def tried(case: Case) -> set[object]:
    """The combinations that `case` tries; besides, every model and every strength under both scopes."""
    combined = {(names, tuple(PROPERTIES[name](case) for name in names)) for names in TOGETHER}
    return combined | {(replace(case.shape, dtype=torch.float32), case.scope), (case.strength, case.scope)}


@cache
def cases() -> list[Case]:
    shapes = [replace(shape, dtype=dtype) for shape in variations() + corners() for dtype in DTYPES]
    possible = [Case(shape, scope, *layout) for shape in shapes for scope in FOLDED for layout in LAYOUTS]
    weak = [Case(Tiny("llava_next", tied=True), scope, strength=0.5) for scope in FOLDED]
    return covering(possible + weak, tried)


def test_the_cases_try_every_combination_that_they_should() -> None:
    for names in TOGETHER:
        found = {tuple(PROPERTIES[name](case) for name in names) for case in cases()}
        values = [{PROPERTIES[name](case) for case in cases()} for name in names]
        assert found == set(itertools.product(*values)), names
    assert {case.shape.dtype for case in cases()} == set(DTYPES)
    assert {case.strength for case in cases()} == {0.5, 1.0}
    models = {(replace(case.shape, dtype=torch.float32), case.scope) for case in cases()}
    assert models >= set(itertools.product(variations() + corners(), FOLDED))
    assert len({str(case) for case in cases()}) == len(cases())


@dataclass(frozen=True)
class Exported:
    case: Case
    source: Path
    folder: Path
    result: Export
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    @property
    def untied(self) -> bool:
        return self.case.scope == "shared" and self.case.shape.tied

    @cached_property
    def model(self) -> Any:
        return load(self.folder)


@pytest.fixture(scope="module", params=cases(), ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case, place = request.param, tmp_path_factory.mktemp("export")
    sizes = {"max_shard_size": SHARDS} if case.sharded else {}
    source = case.shape.save(place / "model", legacy=case.legacy, **sizes)
    case.guard.save(place / "guard.safetensors")
    options = GuardOptions(guard=str(place / "guard.safetensors"))
    result = export_guarded(str(source), place / "guarded", options, skip_behaviour=True)
    return Exported(case, source, result.folder, result, tensors(source), tensors(result.folder))


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_folder_computes_what_the_original_does_with_hooks(exported: Exported) -> None:
    original, folded = load(exported.source), exported.model
    plain, guarded = (AutoProcessor.from_pretrained(folder) for folder in (exported.source, exported.folder))
    dtype = exported.case.shape.dtype
    limit = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps  # what rounding the tensors can do
    others = reference.batches(guarded)
    for name, batch in reference.batches(plain).items():
        assert batch.keys() == others[name].keys()
        assert all(torch.equal(value, others[name][key]) for key, value in batch.items())
        with exported.case.hooks(original):
            expected = reference.logits(original, batch)
        difference = reference.distance(reference.logits(folded, others[name]), expected)
        assert difference <= limit
        assert difference < 0.5 * reference.distance(reference.logits(original, batch), expected)


def test_every_edited_tensor_is_the_projected_one_to_its_last_place(exported: Exported) -> None:
    seen = 0
    for name, before in exported.before.items():
        expected, after = exported.case.projected(name, before), exported.after[name]
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        if expected is None:
            assert torch.equal(after, before), name
            continue
        seen += 1
        info = torch.finfo(after.dtype)
        place = torch.exp2(expected.abs().clamp(min=info.tiny).log2().floor()) * info.eps
        noise = 1e-6 * float(before.abs().max())  # float32 arithmetic on the way
        assert ((after.double() - expected).abs() <= 4.75 * place + noise).all(), name
        assert not torch.equal(after, before), name
    assert seen > 0


def test_nothing_is_added_but_the_head_of_a_model_whose_embedding_is_edited(exported: Exported) -> None:
    added = exported.after.keys() - exported.before.keys()
    assert exported.before.keys() <= exported.after.keys()
    if not exported.untied:
        assert added == set()
        return
    assert added == {"language_model.lm_head.weight" if exported.case.legacy else "lm_head.weight"}
    embedding = next(each for name, each in exported.before.items() if name.endswith("embed_tokens.weight"))
    assert torch.equal(exported.after[added.pop()], embedding)


def test_the_headers_are_kept_byte_by_byte_unless_the_head_is_added(exported: Exported) -> None:
    shards = sorted(path.name for path in exported.source.glob("*.safetensors"))
    assert shards == sorted(path.name for path in exported.folder.glob("*.safetensors"))
    assert (len(shards) > 1) == exported.case.sharded
    changed = 0
    for shard in shards:
        before, after = (folder / shard for folder in (exported.source, exported.folder))
        with before.open("rb") as one, after.open("rb") as other:
            length = one.read(8)
            same = other.read(8) + other.read(int.from_bytes(length, "little")) == length + one.read(
                int.from_bytes(length, "little")
            )
        changed += not same
        with safe_open(before, "pt") as one, safe_open(after, "pt") as other:
            assert one.metadata() == other.metadata()
        if same:
            assert before.stat().st_size == after.stat().st_size
    assert changed == exported.untied


def test_the_index_says_where_every_tensor_is(exported: Exported) -> None:
    name = "model.safetensors.index.json"
    assert (exported.folder / name).exists() == exported.case.sharded
    if exported.case.sharded:
        before, after = (json.loads((folder / name).read_text()) for folder in (exported.source, exported.folder))
        for tensor, shard in after["weight_map"].items():
            with safe_open(exported.folder / shard, "pt") as file:
                assert tensor in file.keys()  # noqa: SIM118
        assert set(after["weight_map"]) == set(exported.after)
        if not exported.untied:
            assert before == after
        grown = sum(each.nbytes for each in exported.after.values()) - sum(e.nbytes for e in exported.before.values())
        assert after["metadata"]["total_size"] - before["metadata"]["total_size"] == grown


def test_the_config_is_kept_but_for_the_tie(exported: Exported) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (exported.source, exported.folder))
    if exported.untied:
        assert after["tie_word_embeddings"] is after["text_config"]["tie_word_embeddings"] is False
        before["tie_word_embeddings"] = before["text_config"]["tie_word_embeddings"] = False
    assert after == before
    model = exported.model
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (exported.case.shape.tied and not exported.untied)


def test_the_evidence_agrees(exported: Exported) -> None:
    evidence = exported.result.evidence
    assert evidence.sound
    assert evidence.integrity.added == tuple(sorted(exported.after.keys() - exported.before.keys()))
    assert evidence.integrity.identical + evidence.integrity.edited == len(exported.before)
    assert evidence.equivalence is not None
    assert evidence.equivalence.exact <= 1e-5
    assert evidence.equivalence.greedy_tokens > 0
