"""Every family, from a folder on disk to a folded one: equal to its hooks, free of leaks, found again by the tracer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import make_gate
from reference import distance
from specimens import Inputs, Knobs, Specimen, build
from specimens.beyond import BEYOND
from specimens.exact import exact
from specimens.known import KNOWN
from torch import Tensor

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.checkpoint.layout import Layout
from guardfold.export.checkpoint.rewrite import rewrite
from guardfold.export.families.table import Family, Table, family_of
from guardfold.export.families.traced_rows import as_toml, family_rows
from guardfold.export.families.tracer import Trace, trace
from guardfold.export.fold import Fold, fold
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard, Intervention
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import SharedProjection, SublayerProjection
from guardfold.guard.model.vlm import auto_class, meta_model
from guardfold.validators.evidence.leaks import leak_probe

SPECIMENS = {specimen.name: specimen for specimen in (*KNOWN, *BEYOND)}
NO_ROW = {"glm5_next", "muse_spark", "qwen4_exp", "qwen4_exp+no_ngrams", "inkling2", "diffusion_gemma"}
REFUSED = {
    *("gemma4", "gemma4+experts", "idefics2", "idefics+vector", "kosmos-2", "kosmos-2.5", "molmo2+norm_after"),
    *("hunyuan_vl", "granite_docling", "chameleon+swin_norm", "inkling_mm_model"),
}
"""Whose residual stream as a whole no weights project; their sublayers they do."""
APPROXIMATE = {
    *("llava+olmo2", "glm4v", "paligemma+gemma2", "gemma3", "lfm3_vl", "ernie4_5_vl_moe", "glm46v", "glmga", "glm_ocr"),
    *("llava+olmo3", "llava+glm4", "llava+gemma2", "llava+gemma3_text"),
    *("exaone4_5", "hyperclovax_vision_v2", "gemma4_unified", "muse_glimmer", "shieldgemma2"),
}
REFUSED_IF_TIED = {"idefics"}
UNREADABLE = {("shieldgemma2", "hub")}
"""save_pretrained loses this one's embedding in the hub's style of names."""
EXACT = set(SPECIMENS) - NO_ROW - REFUSED - APPROXIMATE
VARIATIONS = {"hub": Knobs(), "memory": Knobs(width=48, kv_heads=4, tied=True, bias=False)}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """A specimen saved to disk, as a checkpoint, a family, and a model loaded from there; what is slow is done once."""

    specimen: Specimen
    style: str
    place: Path
    checkpoint: Checkpoint
    family: Family
    model: Any

    @cached_property
    def batches(self) -> Mapping[str, Inputs]:
        found = self.specimen.inputs(self.model.config)
        return {
            name: {key: each.double() if _floats(each) else each for key, each in batch.items()}
            for name, batch in found.items()
        }

    @property
    def basis(self) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        return torch.linalg.qr(torch.randn(self.family.width, 2, generator=draw, dtype=torch.float64)).Q.T.contiguous()

    def logits(self, model: Any) -> Tensor:
        """What `model` says to every modality, in one vector; words it never says left out."""
        together = torch.cat([self.answer(model, modality).flatten() for modality in self.batches])
        return together.where(together.abs() < 1e30, 0)

    def answer(self, model: Any, modality: str) -> Tensor:
        """[batch, tokens, vocabulary]: the logits for one modality."""
        with torch.no_grad(), exact():
            return model(**self.batches[modality], use_cache=False).logits

    @cached_property
    def original(self) -> Tensor:
        return self.logits(self.model)

    @cached_property
    def traced(self) -> Trace:
        with exact():
            return trace(self.model, self.batches.values())

    def folded(self, guard: Guard) -> tuple[Fold, Any]:
        """The fold of `guard`, and the model that plain transformers loads after it."""
        made = fold(guard, self.family, self.checkpoint.shapes, self.checkpoint.read)
        to = Path(tempfile.mkdtemp(dir=self.place))
        rewrite(self.checkpoint, self.family, made, to, lambda _count: None)
        model, info = auto_class(self.checkpoint.config).from_pretrained(
            to, dtype=torch.float64, output_loading_info=True, **EAGER
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        return made, model.eval()

    @cached_property
    def projected_stream(self) -> tuple[Fold, Any]:
        """The same of a projection of the whole residual stream."""
        return self.folded(self.shared)

    @property
    def shared(self) -> Guard:
        return Guard((SharedProjection(self.basis),))

    def hooked(self, guard: Guard) -> Tensor:
        with attached(self.model, guard):
            return self.logits(self.model)

    @property
    def scope_refused(self) -> bool:
        return self.specimen.name in REFUSED or (self.specimen.name in REFUSED_IF_TIED and self.family.tied)


def _floats(each: object) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


def saved(specimen: Specimen, style: str, folder: Path) -> Path:
    """In the hub's key style as one file, or under the names in memory in many small shards."""
    model = build(specimen, VARIATIONS[style], seed=len(specimen.name))
    sizes = {"hub": "1GB", "memory": "60KB"}
    model.save_pretrained(folder, save_original_format=style == "hub", max_shard_size=sizes[style])
    return folder


CASES = [
    (name, style)
    for name in SPECIMENS
    for style in VARIATIONS
    if name not in NO_ROW and (name, style) not in UNREADABLE
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, style = request.param
    place = tmp_path_factory.mktemp("family")
    folder = saved(SPECIMENS[name], style, place / "model")
    checkpoint = Checkpoint.open(folder)
    model = auto_class(checkpoint.config).from_pretrained(folder, dtype=torch.float64, **EAGER).eval()
    return Case(SPECIMENS[name], style, place, checkpoint, family_of(checkpoint), model)


def test_what_the_rows_say_is_what_the_tracer_finds(case: Case) -> None:
    traced = case.traced
    layout = Layout(case.model, case.checkpoint.shapes)
    found = {disk: axis for name, axis in traced.writers.items() for disk in layout.stored[name].disk}
    heard = {writer.disk for writer in case.family.writers if writer.role == "audio"}
    assert set(found) - heard == {writer.disk for writer in case.family.writers} - heard or (
        traced.opaque and set(found) <= {writer.disk for writer in case.family.writers}
    )
    assert bool(traced.opaque) <= bool(case.family.obstacles)
    if case.scope_refused:
        return  # which norm comes last is of no use where none can be passed
    normed = {disk for name in traced.normed for disk in layout.stored[name].disk}
    assert normed == {writer.disk for writer in case.family.writers if writer.post_norm} & set(found)


def test_a_projected_stream_equals_its_hooks_or_says_why_not(case: Case) -> None:
    guard = case.shared
    if case.scope_refused:
        with pytest.raises(InputError, match=re.escape(case.family.obstacles[0])):
            case.folded(guard)
        return
    made, model = case.projected_stream
    assert made.untie == case.family.tied
    hooked = case.hooked(guard)
    with leak_probe(model, guard) as leaks:
        got = case.logits(model)
    assert leaks.worst <= 1e-12
    off, moved = distance(got, hooked), distance(case.original, hooked)
    if case.specimen.name in APPROXIMATE:
        assert made.approximate and TOLERANCE < off < moved
    else:
        assert made.approximate is None and off <= TOLERANCE < moved


def test_each_writer_left_out_shows_as_a_leak(case: Case) -> None:
    if case.scope_refused:
        assert case.family.obstacles
        return
    _, model = case.projected_stream
    for memory in representatives(case):
        parameter = model.get_parameter(memory)
        kept = parameter.data
        parameter.data = case.model.get_parameter(memory).data
        with leak_probe(model, case.shared) as leaks:
            for modality in case.batches:
                case.answer(model, modality)
                if leaks.worst > 1e-4:
                    break
        parameter.data = kept
        assert leaks.worst > 1e-4, memory


def representatives(case: Case) -> Iterator[str]:
    """One writer for each row, among those that the batches reach."""
    seen = set()
    for writer in case.family.writers:
        row = re.sub(r"\d+", "", writer.memory)
        if writer.memory in case.traced.writers and row not in seen:
            seen.add(row)
            yield writer.memory


def test_a_traced_row_alone_describes_the_family(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with exact():
        text = as_toml(family_rows(case.model, {"text": case.batches["text"], **case.batches}))
    (tmp_path / "row.toml").write_text(text)
    monkeypatch.setattr(Table, "built_in", classmethod(lambda cls: cls({}, {})))
    alone = family_of(case.checkpoint, tmp_path / "row.toml")
    if case.scope_refused or alone.obstacles:
        assert case.scope_refused or "image" not in case.batches
        return
    audio = {writer.disk for writer in case.family.writers if writer.role == "audio"}
    theirs, ours = (
        {writer.disk: (writer.axis, writer.layer, writer.post_norm) for writer in family.writers}
        for family in (case.family, alone)
    )
    assert {disk: each for disk, each in theirs.items() if disk not in audio} == {
        disk: each for disk, each in ours.items() if disk not in audio
    }
    assert alone.mlps == case.family.mlps


def test_projected_sublayers_and_a_gate_wherever_an_mlp_holds_one_equal_their_hooks(case: Case) -> None:
    """The gate after a projection of the same layer, which leaves alone what it writes, and before one, which does not;
    an MLP with biases, and one without, where a family has both.
    """
    family = case.family
    bias = {layer: mlp.bias_of(mlp.gate) in case.checkpoint.shapes for layer, mlp in family.mlps.items()}
    for layer in {biased: layer for layer, biased in bias.items()}.values() or [None]:
        bases = {0: case.basis, family.layers - 1: case.basis[:1]}
        projection: Intervention = SublayerProjection(bases | ({} if layer is None else {layer: case.basis}), 0.7)
        guard = Guard((projection,))
        if layer is not None:
            gate = make_gate(family.width, layer, free=not bias[layer], recycled=(1, 4), beta=64.0)
            guard = Guard((projection, gate) if case.style == "hub" else (gate, projection))
        made, model = case.folded(guard)
        assert made.approximate is None and not made.untie
        hooked = case.hooked(guard)
        assert distance(case.logits(model), hooked) <= TOLERANCE < distance(hooked, case.original)
        if layer is not None:
            assert distance(case.hooked(Guard((projection,))), hooked) > TOLERANCE, "the gate does something"


def test_at_least_thirty_families_are_exact() -> None:
    types = {SPECIMENS[name].config(Knobs()).model_type for name in EXACT}
    assert len(types) >= 30


@pytest.mark.parametrize("name", sorted(NO_ROW))
def test_a_family_without_a_row_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = saved(SPECIMENS[name], "memory", tmp_path / "model")
    model_type = meta_model(folder).config.model_type
    with pytest.raises(InputError, match=rf"'{model_type}\w*' has no row"):
        family_of(Checkpoint.open(folder))
