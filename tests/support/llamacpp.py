"""llama.cpp as PyPI has it: built once, given folders of models, and asked.

Needs pip, cmake and a C++ compiler. Nothing of llama.cpp is kept here; it is downloaded, checked and built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load_file, save_file
from serving import running

from guardfold.pipeline import Served, check_served
from guardfold.validators.behaviour.evaluation_prompts import Asked
from guardfold.validators.demo import DEMO
from guardfold.validators.runtimes.endpoint import Endpoint

RELEASE = "llama_cpp_python-0.3.36"
REQUIREMENT = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOWER_NEEDS = ("transformers==4.57.6", "huggingface-hub<1", "tokenizers<0.23")
"""llama.cpp's converter of CLIP towers looks for names that transformers 5 no longer has."""

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_OPENMP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
TOOLS = ("llama-server", "llama-quantize")
QUANTISATIONS = ("f32", "f16", "q8_0", "q4_k_m")
SLOTS, CONTEXT = 8, 256
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
"""Attention in float32; what llama-server does without these options decides a near tie otherwise now and then."""

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")

TEMPLATE = (
    "{%- for message in messages -%}"
    "user:{{ '' if message['content'].startswith('<__media') else ' ' }}{{ message['content'] }}"
    "{%- endfor %} assistant:"
)
"""The demo's chat template for llama-server, which puts a marker and the text that follows it where its template has
room for a text: the space before a picture would be a token that transformers does not have.
"""


def run(*command: str | Path, **environment: str) -> str:
    """What the command says, on both streams; AssertionError with the end of it if it fails."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}"
    return done.stdout


@dataclass(frozen=True)
class LlamaCpp:
    """A folder with llama.cpp's sources and tools, and what its converter of CLIP towers needs."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / RELEASE / "vendor" / "llama.cpp"

    @property
    def tools(self) -> Path:
        return self.folder / "build" / "bin"

    @property
    def lent(self) -> Path:
        """The packages of TOWER_NEEDS."""
        return self.folder / "lent"

    def build(self) -> None:
        """Makes what the folder lacks. AssertionError if something for that is missing or fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.source.is_dir():
            self._unpack()
        if not all((self.tools / name).is_file() for name in TOOLS):
            self._compile()
        if not self.lent.is_dir():
            self._borrow()

    def _unpack(self) -> None:
        with TemporaryDirectory(dir=self.folder) as fresh:
            run(*PIP, "download", "--no-deps", "--no-binary", ":all:", "--dest", fresh, REQUIREMENT)
            packed = Path(fresh) / f"{RELEASE}.tar.gz"
            assert hashlib.sha256(packed.read_bytes()).hexdigest() == SHA256, f"{packed.name}: not the file expected"
            with tarfile.open(packed) as archive:
                archive.extractall(fresh, filter="data")
            (Path(fresh) / RELEASE).rename(self.folder / RELEASE)

    def _compile(self) -> None:
        for needed in ("cmake", "c++"):
            assert shutil.which(needed), f"llama.cpp cannot be built here: {needed} is not installed"
        place = self.tools.parent
        run("cmake", "-S", self.source, "-B", place, *OPTIONS)
        run("cmake", "--build", place, "--parallel", str(os.cpu_count() or 1), "--target", *TOOLS)

    def _borrow(self) -> None:
        with TemporaryDirectory(dir=self.folder) as fresh:
            run(*PIP, "install", "--no-deps", "--target", Path(fresh) / "lent", *TOWER_NEEDS)
            (Path(fresh) / "lent").rename(self.lent)

    def convert(self, model: Path, gguf: Path, *options: str) -> str:
        """The language model of `model`, a folder of transformers, as `gguf`. Returns what the converter says."""
        return run(sys.executable, self.source / "convert_hf_to_gguf.py", model, "--outfile", gguf, *options)

    def quantise(self, model: Path, gguf: Path, kind: str) -> str:
        """The same in one of QUANTISATIONS."""
        if kind in ("f32", "f16"):
            return self.convert(model, gguf, "--outtype", kind)
        with TemporaryDirectory() as scratch:
            halves = Path(scratch) / "f16.gguf"
            self.convert(model, halves, "--outtype", "f16")
            return run(self.tools / "llama-quantize", halves, gguf, kind, "1")

    def convert_tower(self, model: Path, gguf: Path) -> None:
        """CLIP tower and projector of `model`, a LLaVA, as `gguf`, by llama.cpp's converter for LLaVA-1.5."""
        script = self.source / "tools" / "mtmd" / "legacy-models" / "convert_image_encoder_to_gguf.py"
        paths = os.pathsep.join(map(str, (self.lent, self.source / "gguf-py")))
        with TemporaryDirectory() as scratch:
            vision = Path(scratch) / "vision"
            split_vision(model, vision)
            given = ("-m", vision, "--clip-model-is-vision", "--llava-projector", vision / "llava.projector")
            run(sys.executable, script, *given, "--use-f32", PYTHONPATH=paths)
            shutil.move(vision / "mmproj-model-f32.gguf", gguf)

    @contextmanager
    def serve(
        self, gguf: Path, tower: Path | None = None, template: str | None = None, options: Sequence[str] = ()
    ) -> Iterator[str]:
        """The URL of a llama-server, one thread, SLOTS prompts of up to CONTEXT tokens at a time."""
        command: list[str | Path] = [self.tools / "llama-server", "-m", gguf, "--no-ui", "--threads", "1"]
        command += ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT), *options]
        with TemporaryDirectory() as scratch:
            if tower:
                command += ["--mmproj", tower]
            if template:
                file = Path(scratch) / "template.jinja"
                file.write_text(template, encoding="utf-8")
                command += ["--chat-template-file", file]
            with running(command, Path(scratch) / "log") as url:
                yield url


def split_vision(model: Path, folder: Path) -> None:
    """The CLIP tower of `model` as a folder of its own, and its projector as `llava.projector` in it."""
    tensors = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    tower = {
        re.sub(r"^vision_tower\.(vision_model\.)?", "vision_model.", name): tensor
        for name, tensor in tensors.items()
        if name.startswith("vision_tower.")
    }
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith("multi_modal_projector.")}
    config = json.loads((model / "config.json").read_text("utf-8"))
    layer = {"vision_feature_layer": config["vision_feature_layer"]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config["vision_config"] | layer), encoding="utf-8")
    save_file(tower, folder / "model.safetensors", {"format": "pt"})
    torch.save(projector, folder / "llava.projector")


def post(url: str, route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON that a server answers to `body`."""
    request = Request(url + route, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def tokenised(url: str, text: str) -> list[int]:
    """The tokens of the prompt that a server makes of one turn."""
    made = post(url, "/apply-template", {"messages": [{"role": "user", "content": text}]})["prompt"]
    return post(url, "/tokenize", {"content": made, "add_special": True, "parse_special": True})["tokens"]


def complete(url: str, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy tokens after `prompt`, at most `count` of them."""
    body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True}
    return post(url, "/completion", body)["tokens"]


def compare(llama: LlamaCpp, ggufs: Mapping[str, Path], tower: Path, probes: Asked = None) -> Served:
    """What `guarded` does, against `original`, asked as `guardfold check --endpoint` asks, of llama-server as it is."""
    with llama.serve(ggufs["original"], tower) as before, llama.serve(ggufs["guarded"], tower) as now:
        return check_served(
            Endpoint(now, "guarded", concurrency=SLOTS),
            baseline=Endpoint(before, "original", concurrency=SLOTS),
            folder=DEMO,
            probes=probes,
        )
