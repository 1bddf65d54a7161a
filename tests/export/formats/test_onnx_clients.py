"""Clients that are not ours load an exported folder as it is: transformers.js in Node and in Chromium, and
onnxruntime-genai where it has the family.

They need npm (Node 20 or later) and Chromium (Debian and Ubuntu: apt-get install chromium).
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import torch
from command import Command
from PIL import Image
from specimens import Knobs, build
from specimens.known import KNOWN
from transformers import AutoModelForImageTextToText, AutoProcessor
from zoo import random_basis

from guardfold.export.checkpoint.headers import Checkpoint
from guardfold.export.formats.onnx.graphs import Plan, write_graphs
from guardfold.export.formats.onnx.layout import precisions
from guardfold.guard.guard import Guard
from guardfold.guard.interventions import SublayerProjection
from guardfold.guard.prompts.image_kinds import draw
from guardfold.validators.demo import DEMO

CLIENTS = Path(__file__).parent / "clients"
TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
CHROMIUM = "/usr/bin/chromium"
TOKENS = 32
WAIT = 240


@pytest.fixture(scope="module")
def exported(guardfold: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a random guard, as safetensors and as graphs in two number formats; read only."""
    folder = tmp_path_factory.mktemp("onnx")
    Guard((SublayerProjection({3: random_basis(1, 128)}, 0.5),)).save(folder / "guard.safetensors")
    formats = ("--format", "safetensors,onnx", "--onnx-dtype", "fp32,fp16")
    arguments = ("--model", "demo", "--guard", "guard.safetensors", "--skip-behaviour", *formats, "-o", "exported")
    done = guardfold("export", *arguments, cwd=folder)
    assert done.status == 0, done.err
    return folder / "exported"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Two questions, each with a picture that is not of the tower's size (24 x 24) and not square."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.linear_gradient("L").resize((100, 61)).convert("RGB").save(folder / "gradient.png")
    shape: Any = draw("shape", "a shape", "")
    shape.resize((75, 120)).save(folder / "shape.png")
    return [("how to bake bread ?", folder / "gradient.png"), ("what colour is the shape ?", folder / "shape.png")]


@pytest.fixture(scope="module")
def expected(exported: Path, pictures: list[tuple[str, Path]]) -> list[list[int]]:
    """Prompt and answer in torch: the weights of the folder, and the processor of the model it was made from."""
    processor: Any = AutoProcessor.from_pretrained(DEMO)
    model: Any = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32)
    tokens = []
    for text, picture in pictures:
        content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )
        made = model.generate(**inputs, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS)
        tokens.append(made[0].tolist())
    assert tokens[0][-TOKENS:] != tokens[1][-TOKENS:]
    return tokens


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our scripts and transformers.js, as npm installs it."""
    folder = tmp_path_factory.mktemp("site")
    for script in CLIENTS.iterdir():
        shutil.copy(script, folder)
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", TRANSFORMERS_JS]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.node
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_node_says_what_torch_says(
    dtype: str, exported: Path, site: Path, pictures: list[tuple[str, Path]], expected: list[list[int]], tmp_path: Path
) -> None:
    (tmp_path / "asked.json").write_text(json.dumps([(text, str(picture)) for text, picture in pictures]))
    command = ["node", "node.mjs", str(exported), dtype, str(tmp_path / "asked.json"), str(TOKENS)]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.families
@pytest.mark.parametrize("family", ["mistral3", "qwen2_5_vl"])
def test_onnxruntime_genai_says_what_torch_says(family: str, tmp_path: Path) -> None:
    """Text, and a picture of a size of its own, as the model's processor makes them; the folder is opened as it is."""
    genai = importlib.import_module("onnxruntime_genai")
    specimen = next(each for each in KNOWN if each.name == family)
    model = build(specimen, Knobs(layers=2), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    write_graphs(Checkpoint.open(tmp_path), tmp_path, Plan(precisions("fp32")))
    loaded = genai.Model(str(tmp_path))
    inputs = specimen.inputs(model.config)
    for batch in ({name: value[:1] for name, value in inputs["text"].items()}, inputs["image"]):
        batch = {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}
        ids, count = batch["input_ids"], {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(
            do_sample=False, max_length=ids.shape[1] + TOKENS, min_length=ids.shape[1] + TOKENS
        )
        generator = genai.Generator(loaded, parameters)
        if "pixel_values" in batch:
            given = genai.NamedTensors()
            given["input_ids"] = ids.numpy().astype("int32")
            given["num_image_tokens"] = (ids == model.config.image_token_id).sum()[None].numpy()
            for name in ("pixel_values", "image_grid_thw", "image_sizes"):
                if name in batch:
                    given[name] = batch[name].numpy()
            generator.set_inputs(given)
        else:
            generator.append_tokens(ids.numpy().astype("int32"))
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0)) == model.generate(**batch, **count)[0].tolist()


class _Site(SimpleHTTPRequestHandler):
    """Files of `directory`; what is posted goes into `answers`."""

    def __init__(self, *arguments: Any, answers: Queue[Any], **options: Any) -> None:
        self.answers = answers
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.mark.browser
def test_a_browser_says_what_torch_says(
    exported: Path, site: Path, pictures: list[tuple[str, Path]], expected: list[list[int]], tmp_path: Path
) -> None:
    (site / "exported").symlink_to(exported)
    for _, picture in pictures:
        shutil.copy(picture, site)
    asked = [(text, f"/{picture.name}") for text, picture in pictures]
    (site / "asked.json").write_text(json.dumps({"asked": asked, "count": TOKENS}))
    answers: Queue[Any] = Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, answers=answers, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        browser = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-port=0", address], stderr=subprocess.DEVNULL
        )
        try:
            said = answers.get(timeout=WAIT)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    assert said == {"answers": expected}
