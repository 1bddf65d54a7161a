"""A guard: an ordered list of interventions and where they came from, in one .safetensors file.

Each intervention says *what* it changes; hooks.py says what that means in a running model, export/fold.py what it
means in weights. Tensors are float32; the file's metadata is JSON, so that loading a guard runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .base.errors import InputError
from .base.untrusted import parse_object, read_bytes
from .interventions import KINDS, Intervention
from .interventions.base import PerLayer

FORMAT = "guardfold-guard/1"
REFERENCE = "reference"
MAX_GUARD_BYTES = 256 * 2**20
MAX_GUARD_HEADER_BYTES = 16 * 2**20
"""Of a guard file: its provenance, mostly."""


@dataclass(frozen=True)
class Guard:
    """Interventions in the order in which they act, and `provenance`: source model, anchors hash, figures (JSON)."""

    interventions: tuple[Intervention, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reference: PerLayer | None = None
    """The published two-pass form from the same directions, to measure against; no part of what the guard does."""

    def __post_init__(self) -> None:
        if not self.interventions:
            raise InputError("a guard needs at least one intervention")
        taken: set[tuple[int, int]] = set()
        for intervention in self.interventions:
            places = {(layer, place) for layer, of in intervention.places.items() for place in of}
            if places & taken:
                layer = min(places & taken)[0]
                raise InputError(f"two interventions would overwrite the same neurons of layer {layer}")
            taken |= places
        erasing = next((intervention.kind for intervention in self.interventions if intervention.erases_stream), None)
        adding = next((intervention.kind for intervention in self.interventions if intervention.adds), None)
        if erasing and adding:
            raise InputError(f"a {erasing} would erase what a {adding} writes; project sublayers instead")

    @property
    def in_weights(self) -> bool:
        """Whether weights can hold all of it; else only hooks do, and graphs that hooks are traced into."""
        return all(intervention.asks for intervention in self.interventions)

    def check_fits(self, layers: int, width: int) -> None:
        """Raises InputError unless every intervention acts on layers < `layers` of a residual stream `width` wide."""
        for intervention in self.interventions:
            if intervention.width != width:
                raise InputError(
                    f"the guard's directions have {intervention.width} entries, the model's hidden size is {width}"
                )
            if intervention.layers and max(intervention.layers) >= layers:
                raise InputError(
                    f"the guard acts on layer {intervention.layers[-1]}, the model's last layer is {layers - 1}"
                )

    def describe(self) -> list[dict[str, Any]]:
        return [intervention.describe() for intervention in self.interventions]

    def to_bytes(self) -> bytes:
        """Returns the guard file: tensors `<intervention>/<name>` (bases in float64, else float32), JSON metadata under
        the key `guardfold`.
        """
        tensors = {
            f"{index}/{name}": tensor.clone()  # interventions may share a basis, tensors in a file may not
            for index, intervention in enumerate(self.interventions)
            for name, tensor in intervention.tensors().items()
        }
        header = {"format": FORMAT, "interventions": self.describe(), "provenance": dict(self.provenance)}
        if self.reference is not None:
            tensors |= {f"{REFERENCE}/{name}": tensor.clone() for name, tensor in self.reference.tensors().items()}
            header[REFERENCE] = self.reference.describe()
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
            with suppress(OSError):
                partial.unlink()

    @classmethod
    def load(cls, path: Path, folder: Path | None = None) -> Self:
        """Returns the guard in the file `path`. InputError, naming the file, if it is not a sound guard file.

        folder: what `path` lies in and no link may lead out of; without it, `path` itself may be a link.
        """
        if not os.path.lexists(path):
            raise InputError(f"{path}: no such guard file")
        try:
            data = _bytes_of(path, folder)
            header, tensors = _header(data, str(path)), load(data)
            interventions = tuple(
                _parse(entry, _under(str(index), tensors)) for index, entry in enumerate(header["interventions"])
            )
            reference = _parse(header[REFERENCE], _under(REFERENCE, tensors)) if REFERENCE in header else None
            if reference is not None and not (isinstance(reference, PerLayer) and reference.text_layers):
                raise InputError(f"its reference is a {reference.kind}, not a two-pass guard")
            return cls(interventions, _provenance(header), reference)
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: damaged guard file ({type(error).__name__}: {error})") from error


def _bytes_of(path: Path, folder: Path | None) -> bytes:
    real = path if folder else Path(os.path.realpath(path))
    home = folder or real.parent
    return read_bytes(home, str(real.relative_to(home)), MAX_GUARD_BYTES)


def _header(data: bytes, where: str) -> dict[str, Any]:
    """Returns what the metadata of a guard file of the bytes `data` says. InputError that begins with `where`
    otherwise.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_GUARD_HEADER_BYTES:
        raise InputError(f"{where}: damaged guard file (a header of {length} bytes)")
    metadata = parse_object(data[8 : 8 + length], where).get("__metadata__", {})
    header = parse_object(metadata.get("guardfold", "{}").encode(), where)
    if header.get("format") != FORMAT:
        raise InputError(f"{where}: not a guard file (no {FORMAT!r} metadata); make one with `guardfold extract`")
    return header


def _provenance(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the provenance that `header` holds. InputError unless it is an object, and text that any file may
    hold.
    """
    provenance = header["provenance"]
    if not isinstance(provenance, dict):
        raise InputError(f"its provenance is a {type(provenance).__name__}, not an object")
    json.dumps(provenance, ensure_ascii=False).encode()  # ValueError for a lone surrogate
    return provenance


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors named `prefix`/name, by name."""
    return {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}/")}


def _parse(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Intervention:
    if entry["kind"] not in KINDS:
        raise InputError(f"unknown intervention {entry['kind']!r}; this version knows {', '.join(KINDS)}")
    parsed = KINDS[entry["kind"]].parse(entry, tensors)
    if json.loads(json.dumps(parsed.describe())) != entry:
        raise InputError(f"{entry['kind']}: the metadata does not describe the tensors")
    return parsed
