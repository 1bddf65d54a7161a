"""huggingface_hub, which reads its settings when it is imported, pointed at another hub afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants


def use_hub(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub of this process talk to `hub`, with its cache and token file below `home`, for one test."""
    for name, value in hub.environment(str(home)).items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
