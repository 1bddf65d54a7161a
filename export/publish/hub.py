"""Publishing an exported folder as a hub repository: only what was measured, and only if that made it safer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from ...guard.base.errors import InputError, Refused
from ...guard.base.hub import LOGIN, hub_errors, is_hub_id, retried
from ..formats import FORMATS
from .manifest import load_manifest
from .verify import ATTRIBUTES, NOT_OURS, differences

STALE = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.py"]
"""What an earlier version may have left in the repository besides the files of formats: it would not be verified."""


@dataclass(frozen=True)
class Target:
    """Where to publish. private: of a repository that is made.  create_pr: propose the change instead of making it.
    revision: a branch, made from main if need be.
    """

    repo: str
    private: bool = False
    create_pr: bool = False
    revision: str | None = None

    def check(self) -> None:
        """Raises InputError, before any work is done, for a target that cannot be or without a token."""
        if not is_hub_id(self.repo):
            raise InputError(f"{self.repo}: not a hub repository; give USER/REPO")
        with hub_errors(f"{self.repo}: not a hub repository"):
            validate_repo_id(self.repo)
        if self.create_pr and self.revision:
            raise InputError("--create-pr proposes a change to the main branch; leave --revision out")
        if get_token() is None:
            raise InputError(f"{self.repo}: no token to push with; {LOGIN}")


def push(folder: Path, target: Target, *, allow_weaker: bool = False) -> str:
    """Uploads an exported `folder` to `target`, made if need be; the URL of the commit or pull request.

    Pushing again after an interruption sends only what the hub does not have yet. Raises Refused if the verdict is not
    "safer" (unless `allow_weaker`) or the files are not those that were measured, InputError if the hub does not take
    them.
    """
    manifest = load_manifest(folder)
    if not (allow_weaker or (manifest["verified"] and manifest["verdict"] == "safer")):
        raise Refused(
            f"{folder}: verdict {manifest['verdict']!r}, NOT VERIFIED; nothing was pushed (--allow-weaker overrides)"
        )
    target.check()
    if wrong := differences(folder, manifest):
        raise Refused(
            f"{folder}: {len(wrong)} files are not as measured, {wrong[0]}; nothing was pushed; export it again"
        )
    api = HfApi(library_name="guardfold")
    with hub_errors(f"{target.repo}: cannot be pushed to"):
        retried(lambda: api.create_repo(target.repo, private=target.private or None, exist_ok=True))
        if target.private and not retried(lambda: api.repo_info(target.repo)).private:
            raise InputError(
                f"{target.repo}: exists and is public; make it private on its page, or leave --private out"
            )
        if target.revision:
            branch = target.revision
            retried(lambda: api.create_branch(target.repo, branch=branch, exist_ok=True))
        made = retried(
            lambda: api.upload_folder(
                repo_id=target.repo,
                folder_path=folder,
                commit_message=f"guardfold {manifest.get('guardfold', '')}: {manifest['verdict']}",
                revision=target.revision,
                create_pr=target.create_pr or None,
                delete_patterns=[*(pattern for cls in FORMATS.values() for pattern in cls.files), *STALE],
                ignore_patterns=[ATTRIBUTES, *NOT_OURS, *(f"{name}/**" for name in NOT_OURS)],
            )
        )
    return made.pr_url or made.commit_url
