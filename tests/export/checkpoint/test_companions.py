"""What goes beside the weights: all that the processor is loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_processors import REAL

from guardfold.export.checkpoint.companions import copy_companions
from guardfold.guard.model.processor import opened


@pytest.mark.parametrize("alias", ["instructblip", "paligemma", "llava"])
def test_the_processor_of_the_copy_is_that_of_the_source(tmp_path: Path, alias: str) -> None:
    """InstructBLIP has a second tokenizer, in a folder of its own; without that, transformers takes the first twice."""
    source, target = REAL[alias].save(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    copy_companions(source, target)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    kept = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    assert {path.relative_to(target) for path in target.rglob("*") if path.is_file()} == kept
    assert type(opened(target)) is type(opened(source))
