"""The vocabulary of weight edits: what is asked of weights equals the hooks, whoever asks and in whatever order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from adapters import adapted, loaded
from gates import make_gate, unit_vector
from reference import batches, distance, logits
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from traces import traced_once
from transformers import PreTrainedModel
from zoo import Tiny, random_basis

from guardfold import pipeline
from guardfold.export.formats import Formats
from guardfold.guard.base.errors import InputError
from guardfold.guard.guard import Guard
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import (
    KINDS,
    ActivationAddition,
    Intervention,
    LinearGate,
    SublayerProjection,
    register,
)
from guardfold.guard.interventions.base import on_output
from guardfold.guard.model.roles import decoder_layers
from guardfold.guard.model.vlm import load
from guardfold.guard.weight_edits import AddBias, AddLowRank, FormOf

NEURONS, WIDTH = 48, 32
ADDITION = ActivationAddition(1, 2 * unit_vector(WIDTH, 5))
LINEAR = LinearGate(1, unit_vector(NEURONS, 1), 3 * unit_vector(WIDTH, 2))
PROJECTION = SublayerProjection({1: random_basis(1, WIDTH)})
ALONG_IT = ActivationAddition(1, 2 * PROJECTION.bases[1][0].float())


@dataclass(frozen=True)
class AttentionTilt(Intervention):
    """Adds (W + 1) (r . heads) and a constant to what the attention writes: an intervention that no file here knows."""

    kind = "attention-tilt"
    asks = (AddLowRank, AddBias)
    adds = True
    layer: int
    left: Tensor
    right: Tensor
    constant: Tensor

    @property
    def layers(self) -> list[int]:
        return [self.layer]

    @property
    def width(self) -> int:
        return len(self.left)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": self.layer}

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "constant": self.constant}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(header["layer"], **tensors)

    def attach(self, model: PreTrainedModel, text: Any) -> Iterator[RemovableHandle]:
        attention: Any = decoder_layers(model)[self.layer].self_attn
        heads: list[Tensor] = []
        yield attention.o_proj.register_forward_pre_hook(lambda _module, args: heads.append(args[0]))
        yield attention.register_forward_hook(
            on_output(lambda y: y + (heads.pop() @ self.right.to(y))[..., None] * self.left.to(y) + self.constant.to(y))
        )

    def edits(self, form_of: FormOf) -> Iterable[AddLowRank | AddBias]:
        return [
            AddLowRank(self.layer, self.left[:, None], self.right[None], "attention"),
            AddBias(self.layer, self.constant, "attention"),
        ]


@pytest.fixture(scope="module", autouse=True)
def _traces() -> Iterator[None]:
    with traced_once():
        yield


@pytest.fixture
def tilt() -> Iterator[AttentionTilt]:
    register(AttentionTilt)
    try:
        yield AttentionTilt(2, unit_vector(WIDTH, 7), 2 * unit_vector(WIDTH, 8), unit_vector(WIDTH, 9))
    finally:
        del KINDS[AttentionTilt.kind]


def exported(model: Path, guard: Guard, to: Path, form: str = "safetensors") -> Path:
    path = to / "guard.safetensors"
    guard.save(path)
    options = pipeline.GuardOptions(guard=str(path))
    formats = Formats(form, skip_runtime=False)
    return pipeline.export_guarded(str(model), to / "out", options, formats, skip_behaviour=True).folder


def equal_to_hooks(model: Path, guard: Guard, folded: Any, limit: float = 1e-5) -> bool:
    """Whether `folded` says what the hooks say, and the hooks say something else than the original."""
    vlm = load(model, "cpu", torch.float32)
    for batch in batches(vlm.processor).values():
        before = logits(vlm.model, batch)
        with attached(vlm.model, guard):
            hooked = logits(vlm.model, batch)
        if not distance(logits(folded, batch), hooked) <= limit < 1e-3 < distance(before, hooked):
            return False
    return True


@pytest.mark.parametrize("form", ["safetensors", "lora"])
def test_an_intervention_of_the_callers_own_needs_no_other_change(
    tiny_folder: Path, tmp_path: Path, tilt: AttentionTilt, form: str
) -> None:
    guard = Guard((SublayerProjection({2: random_basis(2, WIDTH)}, 0.5), tilt))
    made = exported(tiny_folder, guard, tmp_path, form)
    folded = loaded(made) if form == "safetensors" else adapted(loaded(tiny_folder), made)
    assert equal_to_hooks(tiny_folder, guard, folded)


def test_it_is_compared_with_its_hooks_in_graphs(tiny_folder: Path, tmp_path: Path, tilt: AttentionTilt) -> None:
    made = exported(tiny_folder, Guard((tilt,)), tmp_path, "onnx")
    assert (made / "onnx" / "decoder_model_merged.onnx").is_file()


def test_an_intervention_whose_edits_are_not_its_hooks_is_refused(
    tiny_folder: Path, tmp_path: Path, tilt: AttentionTilt, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = [
        AddLowRank(2, 0.5 * tilt.left[:, None], tilt.right[None], "attention"),
        AddBias(2, tilt.constant, "attention"),
    ]
    monkeypatch.setattr(AttentionTilt, "edits", lambda self, form_of: claimed)
    with pytest.raises(pipeline.NotSafer, match="not sound"):
        exported(tiny_folder, Guard((tilt,)), tmp_path)


def test_a_kind_is_registered_once(tilt: AttentionTilt) -> None:
    assert register(AttentionTilt) is AttentionTilt
    clash = type("Clash", (AttentionTilt,), {})
    with pytest.raises(InputError, match="attention-tilt: an intervention of this kind is known already"):
        register(clash)


PAIRS = {
    "a linear gate, then a gate over two of its neurons": (LINEAR, make_gate(recycled=(3, 7), free=True)),
    "a gate, then a linear gate that reads its neurons": (make_gate(recycled=(3, 7), free=True), LINEAR),
    "a linear gate of a widened MLP": (LINEAR, make_gate(free=True)),
    "two gates of a widened MLP": (make_gate(free=True), make_gate(free=True, seed=3)),
    "two gates of one MLP": (make_gate(recycled=(3, 7), free=True), make_gate(recycled=(8, 9), free=True, seed=3)),
    "a widened layer beside a recycled one": (make_gate(free=True), make_gate(layer=2, free=True, recycled=(1, 2))),
    "a projection, then a vector along it": (PROJECTION, ALONG_IT),
    "a vector, then a projection that takes it": (
        ActivationAddition(1, 2 * PROJECTION.bases[1][0].float()),
        PROJECTION,
    ),
}


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_the_order_of_a_guard_is_that_of_its_edits(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    guard = Guard(PAIRS[name])
    assert equal_to_hooks(tiny_folder, guard, loaded(exported(tiny_folder, guard, tmp_path)))


def test_no_two_interventions_overwrite_the_same_neurons() -> None:
    with pytest.raises(InputError, match="would overwrite the same neurons of layer 1"):
        Guard((make_gate(recycled=(3, 7)), make_gate(recycled=(7, 9), seed=3)))


BIASES = {
    "has biases": Tiny(),
    "can be given biases": Tiny(bias=False, tied=True),
    "another family's key style": Tiny("llava_next", bias=False),
}


@pytest.mark.parametrize("name", sorted(BIASES))
def test_activation_addition_is_a_bias_of_the_mlp(tmp_path: Path, name: str) -> None:
    model = BIASES[name].save(tmp_path / "model")
    guard = Guard((ADDITION,))
    assert equal_to_hooks(model, guard, loaded(exported(model, guard, tmp_path)))


def test_activation_addition_as_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    guard = Guard((ADDITION,))
    made = exported(tiny_folder, guard, tmp_path, "lora")
    assert equal_to_hooks(tiny_folder, guard, adapted(loaded(tiny_folder), made))


def test_where_weights_have_no_bias_graphs_hold_activation_addition(tmp_path: Path) -> None:
    """They are compared with the hooks, and would be refused if they differed."""
    model = Tiny(text="qwen2", bias=False).save(tmp_path / "model")
    guard = Guard((ADDITION,))
    made = exported(model, guard, tmp_path, "onnx")
    assert "traced into its ONNX graphs" in (made / "README.md").read_text()
    assert not list(made.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "form", "complaint"),
    [
        (
            "qwen2",
            "safetensors",
            r"down_proj\.weight: has no bias, and no config gives it one; export it with --format",
        ),
        ("llama", "lora", "no adapter holds any of this guard.*the unmodified model has no such tensor"),
    ],
)
def test_where_no_bias_can_be_it_is_refused_by_name(tmp_path: Path, text: str, form: str, complaint: str) -> None:
    model = Tiny(text=text, bias=False).save(tmp_path / "model")
    with pytest.raises(InputError, match=complaint):
        exported(model, Guard((ADDITION,)), tmp_path, form)
    assert not (tmp_path / "out").exists()


def test_graphs_of_a_folder_without_a_processor_are_asked_what_torch_was(tmp_path: Path) -> None:
    model = Tiny().save(tmp_path / "model", processor=False)
    made = exported(model, Guard((PROJECTION,)), tmp_path, "onnx")
    assert (made / "onnx" / "decoder_model_merged.onnx").is_file()
