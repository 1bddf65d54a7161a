"""In which forms a guarded model is written, and what that asks of its graphs."""

from __future__ import annotations

from dataclasses import dataclass

from ...guard.base.errors import InputError
from ...guard.guard import Guard
from .onnx.graphs import Plan
from .onnx.layout import PROVIDERS, Weights, precisions

FORMATS = ("safetensors", "onnx", "lora")


@dataclass(frozen=True)
class Formats:
    """In which forms a guarded model is written.

    names: safetensors, onnx, or both with a comma; or lora, an adapter for the unmodified model.  onnx_dtype: number
    formats with commas (fp32, fp16, bf16, bf16-native, q8, q4).  onnx_weights: copy, or shared with the safetensors.
    provider: where onnxruntime is compared with torch (auto, cpu, cuda).  skip_runtime: write the graphs without
    running them; the manifest says NOT VERIFIED.
    """

    names: str = "safetensors"
    onnx_dtype: str = "fp32"
    onnx_weights: Weights = "copy"
    provider: str = "auto"
    skip_runtime: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names.split(",")) - set(FORMATS)):
            raise InputError(f"--format {unknown[0]!r}: one of {', '.join(FORMATS)}, or safetensors,onnx")
        if self.has("lora") and self.names != "lora":
            raise InputError(f"--format {self.names}: an adapter is for the unmodified model; write it by itself")
        precisions(self.onnx_dtype)
        if self.provider not in PROVIDERS:
            raise InputError(f"--provider {self.provider}: one of {', '.join(PROVIDERS)}")
        if self.onnx_weights == "shared" and not (self.has("safetensors") and self.has("onnx")):
            raise InputError("--onnx-weights shared: shares them with safetensors; use --format safetensors,onnx")

    def has(self, name: str) -> bool:
        return name in self.names.split(",")

    def plan(self, guard: Guard) -> Plan | None:
        """The graphs to write, `guard` traced into them where weights cannot hold it; None where none are asked for."""
        if not self.has("onnx"):
            return None
        traced = not guard.in_weights and not self.has("safetensors")
        if traced and self.skip_runtime:
            raise InputError(
                "--skip-runtime: this guard is in the graphs alone, so nothing else can show that it works"
            )
        return Plan(precisions(self.onnx_dtype), self.onnx_weights, guard if traced else None)
