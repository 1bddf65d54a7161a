"""In which forms a guarded model is written: one module each, and its line in FORMATS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...guard.base.errors import InputError
from ..checkpoint.rewrite import Writing
from .base import Format
from .lora import Lora
from .onnx import Onnx
from .onnx.layout import Weights
from .safetensors import WRITING, Safetensors

FORMATS: dict[str, type[Format]] = {cls.name: cls for cls in (Safetensors, Onnx, Lora)}
"""What --format calls it -> its class."""


def register_format(cls: type[Format]) -> type[Format]:
    """Makes `cls`, a format of the caller's own, known to Formats and to folders; returns it, so that it may decorate
    one. Raises InputError if its name is taken.
    """
    if FORMATS.setdefault(cls.name, cls) is not cls:
        raise InputError(f"{cls.name}: a format of this name is known already, {FORMATS[cls.name].__name__}")
    return cls


def formats_in(folder: Path) -> list[type[Format]]:
    """Returns the formats that `folder` holds; weights where it holds none that is known."""
    return [cls for cls in FORMATS.values() if cls.found(folder)] or [Safetensors]


@dataclass(frozen=True)
class Formats:
    """In which forms a guarded model is written, as a user says it.

    names: safetensors, onnx, or both with a comma; or lora, an adapter for the unmodified model; or any other of
    FORMATS.  onnx_dtype: number formats with commas (fp32, fp16, bf16, bf16-native, q8, q4).  onnx_weights: copy, or
    shared with the safetensors.  provider: where onnxruntime is compared with torch (auto, cpu, cuda).  skip_runtime:
    write the graphs without running them; the manifest says NOT VERIFIED.  writing: of the safetensors.  more: settings
    of other formats, by name.

    Raises InputError for a format that is not known or goes with no other, and for a setting that none has or takes.
    """

    names: str = "safetensors"
    onnx_dtype: str = "fp32"
    onnx_weights: Weights = "copy"
    provider: str = "auto"
    skip_runtime: bool = False
    writing: Writing = WRITING
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.names.split(",")
        if unknown := sorted(set(names) - set(FORMATS)):
            raise InputError(f"--format {unknown[0]!r}: one of {', '.join(FORMATS)}, or safetensors,onnx")
        for alone in (FORMATS[name].alone for name in names if len(names) > 1):
            if alone:
                raise InputError(f"--format {self.names}: {alone}")
        settings = {setting.name for cls in FORMATS.values() for setting in fields(cls)}
        if unknown := sorted(set(self.more) - settings.difference(vars(self))):
            raise InputError(f"--set {unknown[0]}: no format has such a setting, or it has an option of its own")
        for cls in FORMATS.values():
            self._made(cls)

    @property
    def chosen(self) -> list[Format]:
        """The formats that are named, with their settings; what others are made of first."""
        made = [self._made(FORMATS[name]) for name in dict.fromkeys(self.names.split(","))]
        return sorted(made, key=lambda form: form.derived)

    def _made(self, cls: type[Format]) -> Format:
        settings = {**vars(self), **self.more}
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})
