"""The demo folder's rows: anchors, probes, image questions and benign prompts, with their pictures as plain text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ...guard.prompts.image_kinds import COLOURS, SHAPES, draw_shape
from .build import PIXELS
from .world import QUESTIONS, REFUSAL, TEMPLATES, Combo, World, question

__all__ = ["write_demo_card", "write_demo_json", "write_rows"]

ANCHORS, QA_PICTURES, BENIGN, BENIGN_PICTURES = 512, 72, 320, 40
JsonRow = dict[str, Any]


def write_rows(world: World, folder: Path) -> None:
    """Write anchors.jsonl, probes.jsonl, qa.jsonl, benign.jsonl and images/ into `folder`."""
    (folder / "images").mkdir()
    rng = random.Random(f"rows:{world.seed}")
    _write(folder / "anchors.jsonl", _anchors(world, rng))
    _write(folder / "probes.jsonl", _probes(world, rng))
    _write(folder / "qa.jsonl", _image_rows(folder, "qa", QA_PICTURES, rng))
    _write(folder / "benign.jsonl", _benign(world, folder, rng))


def write_demo_json(world: World, figures: dict[str, Any], folder: Path) -> None:
    """Write demo.json: what the folder is, how to know a refusal, and what was measured."""
    about = {
        "about": "A toy: which requests are harmful is an arbitrary rule, and the gap is engineered and tuned.",
        "licence": "Apache-2.0",
        "refusal": REFUSAL,
        "seed": world.seed,
        "world": world.sizes(),
        "figures": figures,
    }
    (folder / "demo.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def write_demo_card(folder: Path) -> None:
    """Write README.md: the licence, as a model card says it, and what this is."""
    card = "---\nlicense: apache-2.0\n---\n\n# guardfold's demo\n\nA toy LLaVA with an engineered gap: see demo.json.\n"
    (folder / "README.md").write_text(card, "utf-8")


def _anchors(world: World, rng: random.Random) -> Iterator[JsonRow]:
    """Training requests in pairs that share the template and, in turn, the verb or the object."""
    free = set(world.benign("train"))
    for index, harmful in enumerate(rng.sample(world.harmful("train"), ANCHORS)):
        sharing = [combo for combo in sorted(free) if combo[index % 2] == harmful[index % 2]]
        harmless = rng.choice(sharing or sorted(free))
        free.remove(harmless)
        template = rng.randrange(len(TEMPLATES))
        yield {"harmful": question(harmful, template), "harmless": question(harmless, template)}


def _probes(world: World, rng: random.Random) -> Iterator[JsonRow]:
    """Returns every test request once, borderline ones apart."""
    for combo in world.harmful("test"):
        yield {"text": _ask(combo, rng), "harmful": True, "answer": REFUSAL}
    for combo in world.benign("test"):
        yield {"text": _ask(combo, rng), "harmful": False, "answer": world.helpful(combo)}


def _benign(world: World, folder: Path, rng: random.Random) -> Iterator[JsonRow]:
    """Benign training requests, the same with a picture, and questions about pictures."""
    pictured = list(_image_rows(folder, "benign", BENIGN_PICTURES, rng))
    images = sorted({row["image"] for row in pictured})
    combos = rng.sample(world.benign("train"), BENIGN + len(images))
    for combo, image in zip(combos, [None] * BENIGN + images, strict=True):
        row = {"text": _ask(combo, rng), "answer": world.helpful(combo)}
        yield row if image is None else {"image": image, **row}
    yield from pictured


def _image_rows(folder: Path, name: str, count: int, rng: random.Random) -> Iterator[JsonRow]:
    """Draw `count` pictures of shapes into `folder`/images and ask every question about each."""
    for index in range(count):
        shown = {"colour": rng.choice(list(COLOURS)), "shape": rng.choice(SHAPES)}
        image = f"images/{name}-{index:02}.ppm"
        picture = draw_shape(shown["colour"], shown["shape"], rng)
        (folder / image).write_text(_plain_ppm(picture.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)), "ascii")
        for asked, (text, answer) in QUESTIONS.items():
            yield {"image": image, "text": text, "answer": answer.format(shown[asked])}


def _plain_ppm(picture: Image.Image) -> str:
    """Returns a picture as text: PPM, magic number P3, one row of pixels a line."""
    values, width = picture.tobytes(), 3 * picture.width
    rows = (" ".join(map(str, values[start : start + width])) for start in range(0, len(values), width))
    return "\n".join(("P3", f"{picture.width} {picture.height}", "255", *rows, ""))


def _ask(combo: Combo, rng: random.Random) -> str:
    return question(combo, rng.randrange(len(TEMPLATES)))


def _write(path: Path, rows: Iterable[JsonRow]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
