"""What goes beside the weights as it is: tokenizer, processor, generation config, prompt files, licence, code."""

from __future__ import annotations

from pathlib import Path

from ...guard.base.remote_code import code_of, trusted
from ...guard.base.untrusted import FOLDERS, read_bytes
from .staging import MANIFEST

COPIED_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".txt", ".ppm", ".png", ".jpg", ".jpeg"}
COPIED_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
COPIED_FOLDERS = ("images", *FOLDERS)
NOT_COPIED = {MANIFEST, "config.json", "report.json", "adapter_config.json"}
INDEX_SUFFIX = ".index.json"
"""Of files that say where tensors lie: of pickles, of other variants, or stale."""

MAX_COPIED_BYTES = 256 * 2**20


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs beside the weights from folder to folder; what `target` holds already is kept.

    Of code, modules in the folder itself, where it is named (auto_map) and trusted.  Never weights, their indices or
    pickles; never a link that leaves the folder.  Raises InputError for that, and OSError as the disk does.
    """
    for path in sorted([*source.glob("*"), *(path for inner in COPIED_FOLDERS for path in (source / inner).glob("*"))]):
        wanted = path.suffix.lower() in COPIED_SUFFIXES or path.name.startswith(COPIED_PREFIXES)
        if wanted and path.name not in NOT_COPIED and not path.name.endswith(INDEX_SUFFIX):
            _copy(path, source, target)
    copy_code(source, target)


def copy_code(source: Path, target: Path) -> None:
    """Copies the modules of the folder `source` itself to `target`, where it names code and that is trusted. Raises as
    above.
    """
    for path in sorted(source.glob("*.py")) if trusted() and code_of(source) else ():
        _copy(path, source, target)


def _copy(path: Path, source: Path, target: Path) -> None:
    relative = path.relative_to(source)
    if path.is_dir() or (target / relative).exists():
        return
    data = read_bytes(source, str(relative), MAX_COPIED_BYTES)
    (target / relative).parent.mkdir(exist_ok=True)
    (target / relative).write_bytes(data)
