"""Weights as transformers saves them, with the guard folded in: every runtime's own format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...guard.base.progress import megabytes
from ..checkpoint.companions import copy_companions
from ..checkpoint.headers import INDEX_FILE, SINGLE_FILE, Checkpoint
from ..checkpoint.rewrite import Writing, rewrite
from .base import Format, Job

WRITING = Writing()
"""How weights are written unless it is said otherwise."""

LOAD = """\
`PATH` is this folder or its hub id.

**transformers**

```python
from transformers import {auto}, AutoProcessor

model = {auto}.from_pretrained("PATH"{trust})
processor = AutoProcessor.from_pretrained("PATH"{trust})
```

**vLLM**

```bash
vllm serve PATH --served-model-name guarded{serve}
guardfold check --endpoint http://localhost:8000/v1 --model guarded
```"""

LOAD_GRAPHS = """\
**onnxruntime** (where this repository holds an `onnx` folder): three graphs, named as in transformers.js

```python
import onnxruntime

parts = ("vision_encoder", "embed_tokens", "decoder_model_merged")
sessions = {name: onnxruntime.InferenceSession(f"onnx/{name}.onnx") for name in parts}
```

**transformers.js** (the same graphs)

```js
import { AutoModelForImageTextToText, AutoProcessor } from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("PATH");
const model = await AutoModelForImageTextToText.from_pretrained("PATH", { dtype: "fp32" });
```"""


@dataclass(frozen=True)
class Safetensors(Format):
    """A folder of safetensors. writing: threads, rounding, links."""

    name = "safetensors"
    files = ("*.safetensors", "*.index.json")
    writing: Writing = WRITING

    def room(self, checkpoint: Checkpoint) -> int:
        return 0 if self.writing.link == "hard" else checkpoint.data_bytes

    def write(self, job: Job) -> None:
        checkpoint, fold = job.model.checkpoint, job.held.fold
        copy_companions(job.model.folder, job.place)
        with megabytes(checkpoint.data_bytes, "folding" if fold.changed else "copying") as advance:
            rewrite(checkpoint, job.model.family, fold, job.place, advance, self.writing)

    def open(self, job: Job) -> Checkpoint:
        return Checkpoint.open(job.place)

    @classmethod
    def found(cls, folder: Path) -> bool:
        return any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))

    @classmethod
    def card(cls, folder: Path, names: Mapping[str, str]) -> list[str]:
        """Graphs may be added later; of a model with code of its own there are none."""
        return ["## Load it", LOAD.format(**names), *([] if names["trust"] else [LOAD_GRAPHS])]
