"""PEFT adapters for tests: a user's, drawn at random by PEFT itself, and a guard's, loaded as its model card says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from specimens import Knobs, Specimen, build
from specimens.beyond import BEYOND
from specimens.known import KNOWN

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.guard.model.vlm import auto_class

SPECIMENS: dict[str, Specimen] = {specimen.name: specimen for specimen in (*KNOWN, *BEYOND)}
STYLES = {"hub": Knobs(), "memory": Knobs(width=48, kv_heads=4, tied=True, bias=False)}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def saved(name: str, style: str, folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A tiny model on disk: in the hub's names, or, tied and without biases, under the names in memory."""
    model = build(SPECIMENS[name], STYLES[style], seed=len(name), dtype=dtype)
    model.save_pretrained(folder, save_original_format=style == "hub")
    return Checkpoint.open(folder)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    config = Checkpoint.open(folder).config
    return auto_class(config).from_pretrained(folder, dtype=dtype, **EAGER).eval()


def tuned(folder: Path, to: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The model in `folder` with a random adapter of these settings, which PEFT saves into `to`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            loaded(folder, dtype), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter))
        model.save_pretrained(str(to))
    return model.eval()


def adapted(base: Any, folder: Path) -> Any:
    """`base` with a guard's adapters, loaded as the model card says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = PeftModel.from_pretrained(base, folder)
        if (folder / "biased").is_dir():
            model.load_adapter(f"{folder}/biased", "biased")
            model.base_model.set_adapter(["default", "biased"])
    return model.eval()
