"""Plain MLPs fold too: LLaVA around Phi (parallel, GELU) and OPT (ReLU, learned positions, MLP in the layer)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from guardfold import pipeline
from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.families.table import family_of
from guardfold.guard.guard import Guard, Intervention
from guardfold.guard.hooks import attached
from guardfold.guard.interventions import Gate, SharedProjection, SublayerProjection

WIDTH = 32
SIZES: dict[str, dict[str, Any]] = {
    "phi": {"intermediate_size": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
}


def gate(**changes: Any) -> Gate:
    draw = torch.Generator().manual_seed(1)
    detector = torch.nn.functional.normalize(torch.randn(WIDTH, generator=draw), dim=0)
    values = {"layer": 1, "detector": detector, "column": torch.randn(WIDTH, generator=draw), "t0": 0.2, "t1": 0.7}
    return Gate(**{**values, **changes})


GUARDS: dict[str, tuple[Intervention, ...]] = {
    "shared": (SharedProjection(zoo.random_basis(2, WIDTH)),),
    "projected and recycled": (SublayerProjection({1: zoo.random_basis(1, WIDTH)}), gate(recycled=(3, 7))),
    "widened": (gate(),),
    "widened, bias-free": (gate(unit=0.5 * gate().detector),),
}


@pytest.fixture(scope="module", params=sorted(SIZES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = zoo.Tiny()
    text = {
        "model_type": request.param,
        "vocab_size": len(zoo.WORDS) + 4,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        **SIZES[request.param],
    }
    config = LlavaConfig(
        text_config=text,
        vision_config=base.config().vision_config.to_dict(),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder)
    base.processor().save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("name", sorted(GUARDS))
def test_folded_equals_hooked(source: Path, tmp_path: Path, name: str) -> None:
    guard = Guard(GUARDS[name])
    guard.save(tmp_path / "guard.safetensors")
    options = pipeline.GuardOptions(guard=str(tmp_path / "guard.safetensors"))
    made = pipeline.export_guarded(str(source), tmp_path / "out", options, skip_behaviour=True)
    original: Any = AutoModelForImageTextToText.from_pretrained(source).eval()
    folded: Any = AutoModelForImageTextToText.from_pretrained(made.folder).eval()
    before = logits(original)
    with attached(original, guard):
        hooked = logits(original)
    scale = before.abs().max()
    assert (hooked - before).abs().max() > 1e-2 * scale
    assert (logits(folded) - hooked).abs().max() <= 1e-5 * scale


def test_every_writer_is_found(source: Path) -> None:
    family = family_of(Checkpoint.open(source))
    weights = [writer.memory for writer in family.writers if writer.memory.endswith(".weight")]
    positions = [name for name in weights if "embed_positions" in name]
    assert len(weights) == 1 + 1 + 2 * family.layers + len(positions)
    assert bool(positions) == (family.text_model_type == "opt")
    assert all(mlp.up is None for mlp in family.mlps.values())
