"""The guarded model as three ONNX graphs, with the files that clients look for beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....guard.base.errors import InputError
from ....guard.guard import Guard
from ...checkpoint.companions import copy_companions
from ...fold import Fold
from ...model import OpenModel
from ..base import Format, FormatRequest, Held, Job, Notes
from .graphs import Plan, WrittenGraphs, write_graphs
from .layout import ONNX_WEIGHTS, PROVIDERS, Weights, precisions
from .paths import path_of
from .trace import need_onnx

IN_GRAPHS = "which weights cannot hold, traced into its ONNX graphs (their weights are the original's)"

RUN = """\
With onnxruntime: `guardfold chat FOLDER --runtime onnx "..."`. With transformers.js, where it has the family:
`AutoProcessor` and `AutoModelForImageTextToText`, both `from_pretrained(FOLDER)`. The graphs:"""


@dataclass(frozen=True)
class Onnx(Format):
    """Graphs of the guarded weights; of a guard that weights cannot hold, the model's own with its hooks traced in.

    names: the formats that are written, this one among them.  onnx_dtype: number formats, with commas.  onnx_weights:
    copy, or shared with the safetensors.  provider: where onnxruntime is compared with torch.  skip_runtime: nowhere.
    """

    name = "onnx"
    derived = True
    files = ("*.onnx", "*.onnx_data*")
    names: str = "onnx"
    onnx_dtype: str = "fp32"
    onnx_weights: Weights = "copy"
    provider: str = "auto"
    skip_runtime: bool = False

    def __post_init__(self) -> None:
        precisions(self.onnx_dtype)
        if self.provider not in PROVIDERS:
            raise InputError(f"--provider {self.provider}: one of {', '.join(PROVIDERS)}")
        if self.onnx_weights not in ONNX_WEIGHTS:
            raise InputError(f"--onnx-weights {self.onnx_weights}: one of {', '.join(ONNX_WEIGHTS)}")
        if self.onnx_weights == "shared" and not {"safetensors", "onnx"} <= set(self.names.split(",")):
            raise InputError("--onnx-weights shared: shares them with safetensors; use --format safetensors,onnx")

    def check(self, ask: FormatRequest) -> None:
        self._plan(None)
        if self.skip_runtime and self._traces(ask.in_weights):
            raise InputError(
                "--skip-runtime: this guard is in the graphs alone, so nothing else can show that it works"
            )
        need_onnx()
        path_of(ask.model.checkpoint.own_model())

    def hold(self, model: OpenModel, guard: Guard) -> Held:
        if not self._traces(model.holds(guard)):
            return super().hold(model, guard)
        return Held(guard, Fold({}), traced=True)

    def write(self, job: Job) -> None:
        copy_companions(job.model.folder, job.place)
        if job.weights.folder != job.place:
            shutil.copyfile(job.weights.folder / "config.json", job.place / "config.json")
        write_graphs(job.weights, job.place, self._plan(job.held))

    def open(self, job: Job) -> WrittenGraphs | None:
        if self.skip_runtime:
            return None
        return WrittenGraphs(job.place, self._plan(job.held), job.weights.folder, self.provider)

    def notes(self, job: Job) -> Notes:
        return Notes(IN_GRAPHS) if job.held.traced else Notes()

    @classmethod
    def found(cls, folder: Path) -> bool:
        return any(folder.rglob("*.onnx"))

    @classmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        graphs = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
        return ["## Run its ONNX graphs", RUN, "\n".join(f"- `{name}`" for name in graphs)]

    def _traces(self, in_weights: bool) -> bool:
        """Tells whether hooks are traced into the graphs, there being no weights that hold the guard."""
        return not in_weights and "safetensors" not in self.names.split(",")

    def _plan(self, held: Held | None) -> Plan:
        traced = held.guard if held and held.traced else None
        return Plan(precisions(self.onnx_dtype), self.onnx_weights, traced)
