"""What a tracer found, as a family file: rows for the layers, rows for everything else."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from ...guard.base.errors import InputError
from ...guard.model.roles import (
    ATTENTION_NAMES,
    LAYER_LISTS,
    MLPParts,
    decoder,
    decoder_layers,
    mlp_parts,
    output_tensor,
)
from .table import WriterRole, matching, module_name
from .tracer import Trace, trace


def family_rows(model: PreTrainedModel, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a family file's content: what `model`'s layers write, [text], and what everything else does, [vision].

    batches: "text" for prompts without pictures, and one for each other modality; what is not run is not found.
    """
    text, whole = trace(model, [batches["text"]] if "text" in batches else []), trace(model, batches.values())
    prefix = module_name(model, decoder(model))
    rows: dict[str, list[dict[str, Any]]] = {"text": [], "vision": []}
    for name in sorted(whole.writers, key=dot_natural_key):
        of_text = name in text.writers or _LAYER.match(name.removeprefix(prefix))
        part = "text" if name.startswith(prefix) and of_text else "vision"
        row = _row(name, whole, prefix if part == "text" else "", [*model.state_dict()])
        if row not in rows[part]:
            rows[part].append(row)
    types = {"text": model.config.get_text_config().model_type, "vision": model.config.model_type}
    opaque = {"text": text.opaque, "vision": tuple(sorted(set(whole.opaque) - set(text.opaque)))}
    if "image" not in batches:
        opaque["vision"] += ("no picture was traced, so what it writes is not known",)
    refused = {part: {"refused": "; ".join(found)} if found else {} for part, found in opaque.items()}
    mlps = {"mlp": mlp} if (mlp := _mlp_rows(model, prefix)) else {}
    return {
        "text": {"model_types": [types["text"]], **refused["text"], "writer": rows["text"], **mlps},
        "vision": {"model_types": [types["vision"]], **refused["vision"], "writer": rows["vision"]},
    }


_LAYER = re.compile(rf"({'|'.join(LAYER_LISTS)})\.\d+\.")


def _numbered(name: str, every: Iterable[str], wanted: Container[str]) -> str:
    """Returns `name` with its layer's number as {layer} and any other as {n}; one of these as {last} if only the last
    of such names is `wanted`, or as it is if neither is so.

    every: all names there are.  Experts that were not run count as wanted.
    """
    text = _LAYER.sub(r"\1.{layer}.", name, count=1) if _LAYER.match(name) else name
    number = re.compile(r"\b\d+\b")
    places = [found.span() for found in number.finditer(text)]
    general = number.sub("{n}", text)
    lasts = [number.sub("{n}", text[:start]) + "{last}" + number.sub("{n}", text[end:]) for start, end in places]
    for target in (general, *lasts):
        if "expert" in target or all(match.string in wanted for match in matching(target, every)):
            return target
    return text


def _row(name: str, found: Trace, prefix: str, every: Iterable[str]) -> dict[str, Any]:
    inside = {other.removeprefix(prefix) for other in found.writers if other.startswith(prefix)}
    others = [other.removeprefix(prefix) for other in every if other.startswith(prefix)]
    target = _numbered(name.removeprefix(prefix), others, inside)
    module = target.rpartition(".")[0] if target.endswith((".weight", ".bias")) else None
    row: dict[str, Any] = {"role": _role(target), **({"module": module} if module else {"parameter": target})}
    if found.writers[name]:
        row["axis"] = found.writers[name]
    gain = found.normed.get(name)
    if gain is not None:
        row["post_norm"] = _numbered((gain.name or "").removeprefix(prefix), (), ()).removesuffix(".weight")
    if gain is not None and gain.offset:
        row["gain_offset"] = gain.offset
    return row


def _role(target: str) -> WriterRole:
    parts = target.split(".")
    if "{layer}" in parts:
        return "attention" if parts[2] in ATTENTION_NAMES else "mlp"
    if "audio" in target:
        return "audio"
    return "embedding" if "embed" in parts[0] else "vision"


def _mlp_rows(model: PreTrainedModel, prefix: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for layer in decoder_layers(model):
        try:
            parts = mlp_parts(layer)
        except InputError:
            continue
        if not _computes(parts):
            continue
        named = {"gate": parts.gate, "up": parts.up, "down": parts.down}
        row = {
            part: _numbered(module_name(model, linear).removeprefix(prefix).removesuffix("."), (), ())
            for part, linear in named.items()
            if linear is not None
        }
        if row not in rows:
            rows.append(row)
    return rows


def _computes(parts: MLPParts) -> bool:
    """Tells whether the MLP is down(act(gate x) * up x) and nothing more; one that lies in the layer itself is
    believed.
    """
    if parts.output is parts.down:
        return True
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, parts.gate.in_features, generator=draw).to(parts.gate.weight)
    with torch.no_grad():
        neurons = parts.act(parts.gate(x)) * (1 if parts.up is None else parts.up(x))
        try:
            return torch.allclose(output_tensor(parts.output(x)), parts.down(neurons), rtol=1e-3, atol=1e-6)
        except (TypeError, ValueError, RuntimeError):  # it takes more than its input
            return False


def as_toml(rows: Mapping[str, Any]) -> str:
    """Returns `rows` as a family file."""
    lines = []
    for part, table in rows.items():
        lines += [f"[{part}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if key not in _LISTS)]
        for key in _LISTS:
            for row in table.get(key, []):
                lines += ["", f"[[{part}.{key}]]", *(f"{name} = {json.dumps(value)}" for name, value in row.items())]
        lines.append("")
    return "\n".join(lines)


_LISTS = ("writer", "mlp")
