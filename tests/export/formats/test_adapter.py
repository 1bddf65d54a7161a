"""A guard's adapter on the unmodified model: equal to the hooks, removable, mergeable, and honest about its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import SPECIMENS, adapted, loaded, saved
from gates import make_gate
from peft import PeftModel
from reference import distance
from safetensors.torch import load_file
from specimens import Inputs
from torch import Tensor
from zoo import random_basis

from guardfold.export.checkpoint.edits import ProjectColumns, ProjectRows, ProjectSlices
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import Family, family_of
from guardfold.export.fold import Fold, fold
from guardfold.export.formats.lora.adapters import BIASED, Adapter, adaptable, adapters, low_rank, without
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import SharedProjection, SublayerProjection, TwoPass
from guardfold.validators.evidence.integrity import inspect_adapters
from guardfold.validators.runtimes.adapted import Adapted

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A tiny model on disk, and what it says in float32 to every modality."""

    name: str
    checkpoint: Checkpoint
    family: Family

    @cached_property
    def model(self) -> Any:
        """Frozen, as PEFT freezes what it adapts: where gradients are wanted, torch takes other kernels at times."""
        return loaded(self.checkpoint.folder).requires_grad_(False)

    @cached_property
    def batches(self) -> Mapping[str, Inputs]:
        found = SPECIMENS[self.name].inputs(self.model.config)
        return {
            kind: {key: each.float() if each.is_floating_point() else each for key, each in batch.items()}
            for kind, batch in found.items()
        }

    def logits(self, model: Any) -> Tensor:
        """Of real positions; words that a model never says left out."""
        said = []
        with torch.no_grad():
            for batch in self.batches.values():
                real = batch["attention_mask"].bool()
                said.append(model(**batch, use_cache=False).logits[real].flatten())
        return torch.cat(said).where(torch.cat(said).abs() < 1e30, 0)

    def hooked(self, guard: Guard) -> Tensor:
        with attached(self.model, guard):
            return self.logits(self.model)

    def written(self, guard: Guard, to: Path) -> tuple[Fold, list[Adapter], dict[str, str]]:
        made = fold(guard, self.family, self.checkpoint.shapes, self.checkpoint.read)
        found, left_out = adapters(self.checkpoint, self.family, made)
        for each, place in zip(found, (to, to / BIASED), strict=False):
            each.save(place, "owner/base", "abc123")
        return made, found, left_out


def case_of(name: str, style: str, folder: Path) -> Case:
    checkpoint = saved(name, style, folder)
    return Case(name, checkpoint, family_of(checkpoint))


FAMILIES = [
    ("llava+llama", "hub"),  # biases: two adapters
    ("llava+llama", "memory"),  # tied, no biases
    ("paligemma+gemma", "memory"),  # a scaled embedding
    ("qwen3_vl_moe", "hub"),  # experts, turned on disk
    ("glm4v_moe", "hub"),  # experts, one tensor each on disk; names that PEFT renames
    ("aria", "hub"),  # experts [E, in, out]
    ("ernie4_5_vl_moe", "hub"),  # experts of two kinds, made of the same tensors
    ("gemma3", "hub"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, style = request.param
    return case_of(name, style, tmp_path_factory.mktemp("adapter") / "model")


def sublayers(case: Case) -> Guard:
    """Several ranks, and a second projection over the first."""
    first = SublayerProjection(
        {0: random_basis(2, case.family.width), case.family.layers - 1: random_basis(1, case.family.width, 1)}, 0.7
    )
    return Guard((first, SublayerProjection({0: random_basis(1, case.family.width, 2)}, 0.5)))


def test_an_adapter_equals_the_hooks_and_goes_without_a_trace(case: Case, tmp_path: Path) -> None:
    guard = sublayers(case)
    *_, left_out = case.written(guard, tmp_path)
    assert not left_out
    model = adapted(loaded(case.checkpoint.folder), tmp_path)
    hooked, original = case.hooked(guard), case.logits(case.model)
    assert distance(case.logits(model), hooked) <= TOLERANCE < distance(original, hooked)
    weights = dict(case.model.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, weights[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    with model.disable_adapter():
        assert torch.equal(case.logits(model), original)
    assert distance(case.logits(model), hooked) <= TOLERANCE


def test_a_merged_adapter_equals_the_fold(case: Case, tmp_path: Path) -> None:
    guard = sublayers(case)
    made, *_ = case.written(guard, tmp_path / "adapter")
    (tmp_path / "folded").mkdir()
    rewrite(case.checkpoint, case.family, made, tmp_path / "folded", lambda _count: None)
    merged = adapted(loaded(case.checkpoint.folder), tmp_path / "adapter").base_model.merge_and_unload().state_dict()
    for name, tensor in loaded(tmp_path / "folded").state_dict().items():
        if tensor.is_floating_point():
            assert (merged[name] - tensor).abs().max() <= 1e-6 * (1 + tensor.abs().max()), name


def test_the_whole_stream_is_projected_without_untying(case: Case, tmp_path: Path) -> None:
    """Also where the fold is approximate by nature: the adapter is as far from the hooks as the fold is."""
    guard = Guard((SharedProjection(random_basis(2, case.family.width)),))
    made, _, left_out = case.written(guard, tmp_path / "adapter")
    assert not left_out
    model = adapted(loaded(case.checkpoint.folder), tmp_path / "adapter")
    (tmp_path / "folded").mkdir()
    rewrite(case.checkpoint, case.family, made, tmp_path / "folded", lambda _count: None)
    folded = case.logits(loaded(tmp_path / "folded"))
    assert distance(case.logits(model), folded) <= 3 * TOLERANCE
    assert (distance(folded, case.hooked(guard)) <= 3 * TOLERANCE) == (made.approximate is None)


def test_merging_on_a_tied_model_needs_the_head_untied_first(tmp_path: Path) -> None:
    case = case_of("llava+llama", "memory", tmp_path / "model")
    assert case.family.tied
    guard = Guard((SharedProjection(random_basis(1, case.family.width)),))
    case.written(guard, tmp_path / "adapter")
    hooked = case.hooked(guard)
    found = []
    for untie in (False, True):
        base = loaded(case.checkpoint.folder)
        if untie:
            base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
            base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
        merged = adapted(base, tmp_path / "adapter").base_model.merge_and_unload()
        found.append(distance(case.logits(merged), hooked))
    assert found[1] <= TOLERANCE < 1e-2 < found[0]


def test_the_config_names_the_base_and_scales_by_one(tmp_path: Path) -> None:
    case = case_of("llava+llama", "memory", tmp_path / "model")
    case.written(sublayers(case), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "abc123")
    assert (config["peft_type"], config["bias"], config["use_dora"]) == ("LORA", "none", False)
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"] and set(config["rank_pattern"].values()) == {1}
    assert config["r"] == 3


def test_entries_are_named_as_vllm_reads_them(tmp_path: Path) -> None:
    """base_model.model.MODULE.lora_A.weight: what its LoRA loader parses, with the module names of transformers."""
    case = case_of("llava+llama", "memory", tmp_path / "model")
    case.written(sublayers(case), tmp_path / "adapter")
    modules = dict(case.model.named_modules())
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match and match[1] in modules
        assert tensor.dtype == torch.float32
        assert tensor.shape[1 if match[2] == "A" else 0] == modules[match[1]].weight.shape[1 if match[2] == "A" else 0]


def test_transformers_loads_it_without_peft_s_class(tmp_path: Path) -> None:
    case = case_of("llava+llama", "memory", tmp_path / "model")
    guard = Guard((SharedProjection(random_basis(1, case.family.width)),))
    case.written(guard, tmp_path / "adapter")
    model = loaded(case.checkpoint.folder)
    model.load_adapter(str(tmp_path / "adapter"))
    assert not isinstance(model, PeftModel)
    assert distance(case.logits(model), case.hooked(guard)) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "shape", "axis"), [(ProjectRows, (8, 5), 0), (ProjectColumns, (5, 8), 1), (ProjectSlices, (3, 8, 5), 1)]
)
def test_a_low_rank_update_is_what_the_edits_do_one_after_the_other(
    kind: Any, shape: tuple[int, ...], axis: int
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)
    gain = 1 + 0.3 * torch.randn(8, generator=draw, dtype=torch.float64)
    edits = [kind(random_basis(2, 8).double(), 0.7), kind(random_basis(1, 8, 1).double(), 1.0, gain)]
    expected = weight.movedim(axis, -1)
    for edit in edits:
        expected = expected - edit.strength * (expected @ edit.reading.T) @ edit.writing
    update = low_rank(lambda first, last: weight[first:last], shape, edits)
    assert update.left.shape[-1] == update.right.shape[-2] == 3
    assert torch.allclose(weight + update.left @ update.right, expected.movedim(-1, axis), atol=1e-12)


def test_what_adapters_cannot_hold_is_told_apart() -> None:
    projection = SublayerProjection({0: random_basis(1, 32)})
    kept, lost = adaptable(Guard((projection, make_gate(recycled=(1, 2)))))
    assert kept is not None and kept.interventions == (projection,)
    assert kept.provenance["left_out"][0]["kind"] == "gate"
    assert len(lost) == 1 and lost[0].startswith("gate (layer 1)")
    assert adaptable(Guard((projection,)))[1] == []
    assert adaptable(Guard((TwoPass({0: random_basis(1, 32)}),)))[0] is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llava_next+llama", "image_newline"),
        ("llava+opt", "embed_positions.weight"),
        ("muse_glimmer", "embed_tokens.weight"),  # norms what it looks up, of which PEFT knows nothing
    ],
)
def test_writers_without_an_adapter_are_named(name: str, tensor: str, tmp_path: Path) -> None:
    case = case_of(name, "hub", tmp_path / "model")
    made, _, left_out = case.written(Guard((SharedProjection(random_basis(1, case.family.width)),)), tmp_path / "a")
    (lost,) = left_out
    assert lost.endswith(tensor)
    held = without(made, left_out)
    assert held.left_out and held.approximate and lost in held.approximate and lost not in held.edits


@pytest.mark.parametrize(("name", "sound"), [("glm4v_moe", True), ("mistral_large4", False)])
def test_what_peft_would_not_load_is_unsound(name: str, sound: bool, tmp_path: Path) -> None:
    """PEFT 0.21 renames the entries of Mistral Large 4's experts on loading, warns, and goes on without them."""
    case = case_of(name, "memory", tmp_path / "model")
    case.written(sublayers(case), tmp_path / "adapter")
    found = inspect_adapters(Adapted(case.checkpoint, tmp_path / "adapter"))
    assert found.passed == sound
    assert all("is not what PEFT loads" in failure for failure in found.failures)
