"""A guard: an ordered list of interventions and where they came from, in one .safetensors file.

Each intervention says *what* it changes; hooks.py says what that means in a running model, export/fold.py what it
means in weights. Tensors are float32; the file's metadata is JSON, so that loading a guard runs no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import InputError

FORMAT = "guardfold-guard/1"
ORTHONORMAL_TOLERANCE = 1e-4
"""Largest |V V^T - I| accepted in a guard file; float32 SVD leaves about 1e-6."""


def check_basis(basis: Tensor, where: str) -> Tensor:
    """`basis` [m, d] in float32 after checking that it is finite with orthonormal rows; InputError otherwise."""
    basis = basis.detach().to(device="cpu", dtype=torch.float32).contiguous()
    if basis.ndim != 2 or not 0 < basis.shape[0] <= basis.shape[1]:
        raise InputError(f"{where}: shape {list(basis.shape)} is not [m, d] with 0 < m <= d")
    if not torch.isfinite(basis).all():
        raise InputError(f"{where}: NaN or Inf in the basis")
    if (basis @ basis.T - torch.eye(len(basis))).abs().max() > ORTHONORMAL_TOLERANCE:
        raise InputError(f"{where}: rows are not orthonormal")
    return basis


def check_strength(strength: float, where: str) -> float:
    """`strength` after checking that it lies in (0, 1]; InputError otherwise."""
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InputError(f"{where}: strength {strength!r} is not in (0, 1]")
    return float(strength)


def _layer_number(key: str, where: str) -> int:
    if not key.isdecimal():
        raise InputError(f"{where}: {key!r} is not a layer number")
    return int(key)


@dataclass(frozen=True)
class SublayerProjection:
    """Removes `strength` of span(bases[l]) from what the attention and the MLP of layer l write.

    bases: layer (0-indexed) -> V_l, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind: ClassVar[str] = "sublayer-projection"
    bases: Mapping[int, Tensor]
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not self.bases:
            raise InputError(f"{self.kind}: no layers")
        bases = {layer: check_basis(self.bases[layer], f"{self.kind}, layer {layer}") for layer in sorted(self.bases)}
        object.__setattr__(self, "bases", bases)
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))

    @property
    def layers(self) -> list[int]:
        return list(self.bases)

    @property
    def width(self) -> int:
        return next(iter(self.bases.values())).shape[1]

    def describe(self) -> dict[str, Any]:
        """What the manifest and the guard file say of it: JSON, no tensors."""
        ranks = {layer: len(basis) for layer, basis in self.bases.items()}
        return {"kind": self.kind, "strength": self.strength, "ranks": ranks}

    def tensors(self) -> dict[str, Tensor]:
        return {str(layer): basis for layer, basis in self.bases.items()}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        bases = {_layer_number(key, cls.kind): tensor for key, tensor in tensors.items()}
        return cls(bases, header["strength"])


@dataclass(frozen=True)
class SharedProjection:
    """Removes `strength` of span(basis) from the whole residual stream: from everything that any norm reads.

    basis: V, [m, d] with orthonormal rows.  strength: in (0, 1].
    """

    kind: ClassVar[str] = "shared-projection"
    basis: Tensor
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "basis", check_basis(self.basis, self.kind))
        object.__setattr__(self, "strength", check_strength(self.strength, self.kind))

    @property
    def layers(self) -> list[int]:
        return []

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "strength": self.strength, "rank": len(self.basis)}

    def tensors(self) -> dict[str, Tensor]:
        return {"basis": self.basis}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(tensors["basis"], header["strength"])


@dataclass(frozen=True)
class TwoPass:
    """VLM-Guard's step 3 as published: a text-only pass decides, per layer, whether to steer the last prompt token.

    h*_l(Q) = h'_l(Q) + alpha g_l h_l(q) V_l^T V_l with g_l = 1[h_l(q) . v_1 > 0]; h' = h - h V_l^T V_l if `project`,
    else h.  bases: layer -> V_l, [m, d], orthonormal rows, row 0 = v_1.  Hooks only: no weights hold a second pass.
    """

    kind: ClassVar[str] = "two-pass"
    bases: Mapping[int, Tensor]
    alpha: float = 1.0
    project: bool = False

    def __post_init__(self) -> None:
        bases = {layer: check_basis(self.bases[layer], f"{self.kind}, layer {layer}") for layer in sorted(self.bases)}
        object.__setattr__(self, "bases", bases)

    @property
    def layers(self) -> list[int]:
        return list(self.bases)

    @property
    def width(self) -> int:
        return next(iter(self.bases.values())).shape[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "alpha": self.alpha, "project": self.project, "layers": self.layers}

    def tensors(self) -> dict[str, Tensor]:
        return {str(layer): basis for layer, basis in self.bases.items()}

    @classmethod
    def parse(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        bases = {_layer_number(key, cls.kind): tensor for key, tensor in tensors.items()}
        return cls(bases, float(header["alpha"]), bool(header["project"]))


Intervention = SublayerProjection | SharedProjection | TwoPass
KINDS: dict[str, type[Intervention]] = {cls.kind: cls for cls in (SublayerProjection, SharedProjection, TwoPass)}


@dataclass(frozen=True)
class Guard:
    """Interventions in the order in which they act, and `provenance`: source model, anchors hash, figures (JSON)."""

    interventions: tuple[Intervention, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.interventions:
            raise InputError("a guard needs at least one intervention")

    def check_fits(self, layers: int, width: int) -> None:
        """InputError unless every intervention acts on layers < `layers` of a residual stream `width` wide."""
        for each in self.interventions:
            if each.width != width:
                raise InputError(
                    f"the guard's directions have {each.width} entries, the model's hidden size is {width}"
                )
            if each.layers and each.layers[-1] >= layers:
                raise InputError(f"the guard acts on layer {each.layers[-1]}, the model's last layer is {layers - 1}")

    def describe(self) -> list[dict[str, Any]]:
        return [each.describe() for each in self.interventions]

    def to_bytes(self) -> bytes:
        """The guard file: float32 tensors `<intervention>/<name>`, JSON metadata under the key `guardfold`."""
        tensors = {
            f"{index}/{name}": tensor.contiguous()
            for index, each in enumerate(self.interventions)
            for name, tensor in each.tensors().items()
        }
        header = {"format": FORMAT, "interventions": self.describe(), "provenance": dict(self.provenance)}
        return save(tensors, metadata={"guardfold": json.dumps(header, sort_keys=True)})

    @property
    def hash(self) -> str:
        """SHA-256 of the guard file, hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the guard file: whole, or not at all. InputError if the disk does not take it."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(self.to_bytes())
            partial.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The guard in the file `path`. InputError, naming the file, if it is not a sound guard file."""
        if not path.is_file():
            raise InputError(f"{path}: no such guard file")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("guardfold", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise InputError(
                    f"{path}: not a guard file (no {FORMAT!r} metadata); make one with `guardfold extract`"
                )
            interventions = tuple(
                _parse(entry, {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{index}/")})
                for index, entry in enumerate(header["interventions"])
            )
            return cls(interventions, header["provenance"])
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}: damaged guard file ({type(error).__name__}: {error})") from error


def _parse(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if entry["kind"] not in KINDS:
        raise InputError(f"unknown intervention {entry['kind']!r}; this version knows {', '.join(KINDS)}")
    parsed = KINDS[entry["kind"]].parse(entry, tensors)
    if json.loads(json.dumps(parsed.describe())) != entry:
        raise InputError(f"{entry['kind']}: the metadata does not describe the tensors")
    return parsed
