"""A checkpoint as three graphs in a folder, vision_encoder, embed_tokens, decoder_model_merged, in number formats."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from transformers import PreTrainedModel

from ....guard.base.errors import InputError
from ....guard.base.progress import track
from ....guard.guard import Guard
from ....guard.hooks import attached
from ...checkpoint.headers import Checkpoint
from .configs import write_client_files, write_genai_config
from .decoder import decoder_sketch, embed_sketch, merged_sketch
from .layout import DECODER, EMBED, FOLDER, GRAPHS, MERGED, PRECISIONS, VISION, Precision, Weights, graph_file
from .paths import path_of
from .quantize import link_aliases, quantize
from .trace import faked, need_onnx, trace_graph
from .weights import Binder

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Plan:
    """What to write: the number formats, whose weights the graphs read, and a guard that is traced into the decoder
    (its hooks, not its fold) where weights cannot hold it."""

    precisions: tuple[Precision, ...]
    weights: Weights = "copy"
    traced: Guard | None = None

    def __post_init__(self) -> None:
        quantised = [precision.name for precision in self.precisions if precision.bits]
        if self.weights == "shared" and quantised:
            raise InputError(f"--onnx-weights shared: {quantised[0]} has weights of its own; use copy")


@dataclass(frozen=True)
class WrittenGraphs:
    """Graphs that were written: where, as what, of the weights in which folder, and where they are to be run."""

    folder: Path
    plan: Plan
    weights: Path
    provider: str


def graphs_folder(folder: Path, weights: Weights) -> Path:
    """Where the graphs of an exported `folder` lie."""
    return folder if weights == "shared" else folder / FOLDER


def write_graphs(checkpoint: Checkpoint, target: Path, plan: Plan) -> None:
    """Writes the graphs of `checkpoint` and what clients need into the existing folder `target`.

    With shared weights `target` must hold the checkpoint's files. Memory holds a tensor at a time, and no weight is
    read but to be copied. Raises InputError if the family has no graphs, a tensor has no place in them, or a parameter
    has no tensor.
    """
    need_onnx()
    place = graphs_folder(target, plan.weights)
    place.mkdir(exist_ok=True)
    files: dict[str, int] = {}
    plain = [precision for precision in plan.precisions if not precision.bits]
    for compute in dict.fromkeys(precision.compute for precision in plain):
        traced = Traced.of(checkpoint, compute, plan.traced)
        for precision in (precision for precision in plain if precision.compute == compute):
            files |= traced.write(precision, place, plan.weights)
    if any(precision.bits for precision in plan.precisions):
        files |= _quantised(checkpoint, place, plan)
    write_client_files(target, plan.precisions[0].name, files)
    write_genai_config(path_of(checkpoint.own_model()), target, place, plan.precisions[0])


@dataclass(frozen=True)
class Traced:
    """The three graphs in one compute dtype, without weights. unread: prefixes of parameters that none needs."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    graphs: dict[str, ir.Model]
    unread: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, compute: torch.dtype, guard: Guard | None) -> Self:
        """Returns the graphs of `checkpoint`'s model computing in `compute`, with `guard`'s hooks if there is one."""
        model = checkpoint.own_model()
        model.set_attn_implementation("eager")
        path = path_of(model)
        mode = faked(model, compute)
        with attached(model, guard) if guard else nullcontext():
            sketches = {VISION: path.sketch(), EMBED: embed_sketch(model), DECODER: decoder_sketch(path)}
            if path.genai:
                sketches[MERGED] = merged_sketch(model)
            graphs = {name: trace_graph(sketch, mode) for name, sketch in track(list(sketches.items()), "tracing")}
        return cls(checkpoint, model, graphs, path.unread())

    def write(self, precision: Precision, place: Path, weights: Weights) -> dict[str, int]:
        """Writes the three into `place`. Returns file name -> number of data files, for those that have some."""
        import onnx_ir as ir

        binder, files = Binder(self.checkpoint, self.model), {}
        for name, bare in self.graphs.items():
            path, graph = place / graph_file(name, precision), bare.clone()
            if weights == "shared":
                binder.share(graph, precision)
            elif count := binder.copy(graph, precision, path):
                files[path.name] = count
            ir.save(graph, path)
        binder.check_all_used(self.unread)
        return files


def _quantised(checkpoint: Checkpoint, place: Path, plan: Plan) -> dict[str, int]:
    """Returns the graphs in every quantised format, made from the float32 ones; those are written aside where not asked
    for.
    """
    files: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        whole = PRECISIONS["fp32"]
        source = place if whole in plan.precisions else Path(scratch)
        if source != place:
            Traced.of(checkpoint, whole.compute, plan.traced).write(whole, source, "copy")
        for precision in (precision for precision in plan.precisions if precision.bits):
            for graph in (name for name in (*GRAPHS, MERGED) if (source / graph_file(name, whole)).is_file()):
                target = place / graph_file(graph, precision)
                if count := quantize(source / graph_file(graph, whole), target, precision):
                    files[target.name] = count
                else:
                    link_aliases(target, precision)
    return files
