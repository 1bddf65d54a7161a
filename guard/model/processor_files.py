"""The files of a model folder that its processor is made of."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..base.remote_code import MAX_CONFIG_BYTES, trusted
from ..base.untrusted import open_regular, parse_object, read_bytes

PROCESSOR_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
NOT_OF_PROCESSORS = (
    "config.json",
    "report.json",
    "guardfold.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
"""Of files in a model folder: what processors are made of, and what they are not."""

OF_CONFIG = ("model_type", "processor_class", "tokenizer_class", "auto_map")
"""What decides in config.json which classes load a processor."""


def digest_of(folder: Path) -> bytes:
    """Returns the SHA-256 of everything in `folder` that a processor is made of: folders with the same have the same
    processor. Raises InputError for files that are not what they should be.
    """
    digest = hashlib.sha256(str(trusted()).encode())
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.name.endswith(PROCESSOR_SUFFIXES) and path.name not in NOT_OF_PROCESSORS and not path.is_dir():
            name = str(path.relative_to(folder))
            with os.fdopen(open_regular(folder, name), "rb") as file:
                digest.update(
                    f"{name}\n".encode(errors="surrogateescape") + hashlib.file_digest(file, "sha256").digest()
                )
    config = parse_object(read_bytes(folder, "config.json", MAX_CONFIG_BYTES), str(folder / "config.json"))
    digest.update(json.dumps({name: config.get(name) for name in OF_CONFIG}).encode())
    return digest.digest()
