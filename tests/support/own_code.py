"""A model folder with Python code of its own: a LLaVA under another name, in two modules that leave a mark when run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import Tiny

CONFIGURATION = """
from pathlib import Path

from transformers import LlavaConfig

Path({mark!r}).touch()


class CustomConfig(LlavaConfig):
    model_type = "custom_vlm"
"""
MODELING = """
from transformers import LlavaForConditionalGeneration

from .configuration_custom import CustomConfig


class CustomModel(LlavaForConditionalGeneration):
    config_class = CustomConfig
"""
AUTO_MAP = {
    "AutoConfig": "configuration_custom.CustomConfig",
    "AutoModelForImageTextToText": "modeling_custom.CustomModel",
}


def custom_model(folder: Path, mark: Path, auto_map: dict[str, Any] | None = None, tiny: Tiny | None = None) -> Path:
    """Writes it into `folder`. mark: a file that is made whenever its code is run."""
    (tiny or Tiny()).save(folder, legacy=False)
    (folder / "configuration_custom.py").write_text(CONFIGURATION.format(mark=str(mark)))
    (folder / "modeling_custom.py").write_text(MODELING)
    change_json(folder / "config.json", model_type="custom_vlm", auto_map=auto_map or AUTO_MAP)
    return folder


def change_json(path: Path, **entries: Any) -> None:
    held = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**held, **entries}))
