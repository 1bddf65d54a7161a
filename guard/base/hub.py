"""The Hugging Face Hub: a model's files at one commit; what the hub's errors mean, in a line and without tokens."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import InputError, first_line
from .remote_code import trusted
from .untrusted import parse_object, read_bytes

COMPANIONS = [
    *("*.json", "*.jsonl", "*.jinja", "*.model", "*.txt"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*", "README.md", "images/*"),
]
"""What a repository is asked for beside its weights: configs, tokenizer, processor, prompt files, licence."""

CODE = ["*.py"]
"""What it is asked for as well where the code that comes with a model is trusted."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""What transformers looks for first, and then."""

WEIGHT_FILES = [SINGLE, "adapter_model.safetensors"]
"""The weights of a repository that are in one file, a model's or an adapter's."""

MAX_INDEX_BYTES = 64 * 2**20
DOWNLOAD_ATTEMPTS = 4
LONGEST_WAIT = 60
"""Seconds between two attempts at most, whatever a server asks for."""

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of what may work if it is tried again."""

TOKEN = re.compile(r"\bhf_\w{8,}|(?<=Bearer )\S+")
LOGIN = "run `hf auth login` or set HF_TOKEN"

Downloaded = TypeVar("Downloaded")


def split_revision(name: str) -> tuple[str, str | None]:
    """Returns (hub id, revision) of HUB_ID[@REVISION]; the revision is a branch, a tag or a commit."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def is_hub_id(name: str) -> bool:
    """Tells whether `name` could be owner/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def download(hub_id: str, revision: str | None = None) -> Path:
    """Returns the snapshot folder, named after its commit, of what guardfold needs of a model: configs, then
    model.safetensors, or, where there is none, the safetensors that the index names. What the cache holds is not asked
    for again. Raises InputError if it cannot be had.
    """
    with hub_errors(f"{hub_id}: cannot be had from the Hugging Face Hub"):
        folder = download_config(hub_id, revision)
        folder = _snapshot(hub_id, folder.name, WEIGHT_FILES)
        listed = [] if (folder / SINGLE).is_file() else _listed(folder)
        return _snapshot(hub_id, folder.name, listed) if listed else folder


def download_config(hub_id: str, revision: str | None = None) -> Path:
    """Returns the snapshot folder, named after its commit, of a model's companions, without weights; and of its code,
    if that is trusted. Raises as `_snapshot`.
    """
    return _snapshot(hub_id, revision, [*COMPANIONS, *(CODE if trusted() else [])])


def download_everything(hub_id: str, revision: str | None = None) -> Path:
    """Returns the snapshot folder, named after its commit, of every file of a repository. Raises InputError as
    `download`.
    """
    with hub_errors(f"{hub_id}: cannot be had from the Hugging Face Hub"):
        return _snapshot(hub_id, revision, None)


def _snapshot(hub_id: str, revision: str | None, patterns: list[str] | None) -> Path:
    return Path(retried(lambda: snapshot_download(hub_id, revision=revision, allow_patterns=patterns)))


def _listed(folder: Path) -> list[str]:
    """Returns the files that the index in `folder` names; none if there is no index, or what is wrong with it is to be
    said where it is read.
    """
    try:
        index = parse_object(read_bytes(folder, INDEX, MAX_INDEX_BYTES), str(folder / INDEX))
        named = set(index["weight_map"].values())
        return sorted(name for name in named if re.fullmatch(r"[\w.\-]+\.safetensors", name))
    except (InputError, KeyError, TypeError, AttributeError):
        return []


def retried(step: Callable[[], Downloaded]) -> Downloaded:
    """Returns what `step` returns, tried again where it fails for a passing reason: a lost connection, 429, 5xx."""
    for attempt in range(1, DOWNLOAD_ATTEMPTS):
        try:
            return step()
        except Exception as error:
            if not _passing(_root(error)):
                raise
            time.sleep(_wait(_root(error), attempt))
    return step()


def _passing(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in TRANSIENT
    return isinstance(error, HTTPError | json.JSONDecodeError) and not isinstance(error, OfflineModeIsEnabled)


def _wait(error: BaseException, attempt: int) -> float:
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return min(LONGEST_WAIT, float(asked) if asked.isdigit() else 2.0 ** (attempt - 1))


@contextmanager
def hub_errors(failed: str) -> Iterator[None]:
    """Turns whatever huggingface_hub raises in the block into InputError(`failed` (reason)), without its traceback: an
    answer may repeat the token that was sent.
    """
    try:
        yield
    except InputError:
        raise
    except (HTTPError, HFValidationError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(without_tokens(f"{failed} ({_reason(_root(error))})")) from None


def without_tokens(text: str) -> str:
    """Returns `text` with everything that is or looks like a token struck out."""
    token = get_token()
    return TOKEN.sub("<token>", text.replace(token, "<token>") if token else text)


def _root(error: BaseException) -> BaseException:
    """Returns what an error that only says that something failed was raised from."""
    while error.__cause__ is not None and isinstance(error, LocalEntryNotFoundError | RuntimeError):
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms on its page, and {LOGIN} with that account"
    if isinstance(error, DisabledRepoError):
        return "the hub has disabled it"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return f"no such repository, or a private one that your token may not see; {LOGIN}"
    if isinstance(error, HfHubHTTPError) and not isinstance(error, EntryNotFoundError):
        return _status(error.response.status_code, error.server_message or "")
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE), and it is not in the cache"
    if isinstance(error, HTTPError):
        return f"the connection failed: {first_line(error)}; try again"
    if isinstance(error, json.JSONDecodeError | KeyError):
        return "it answered what a hub does not; try again later"
    return first_line(error)


def _status(status: int, detail: str) -> str:
    detail = f": {' '.join(detail.split())[:200]}" if detail else ""
    if status == 401:
        return f"401, the token is missing or not valid; {LOGIN}"
    if status == 403:
        return f"403, the token may not do this; it needs write access there{detail}"
    if status == 409:
        return f"409, another change got in the way; try again{detail}"
    if status == 429:
        return "429, too many requests; try again later"
    if status >= 500:
        return f"{status}, the hub is in trouble; try again later"
    return f"{status}{detail}"
