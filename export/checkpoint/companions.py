"""What goes beside the weights as it is: tokenizer, processor, generation config, prompt files, licence, code."""

from __future__ import annotations

from pathlib import Path

from ...guard.base.remote_code import code_of, trusted
from ...guard.base.untrusted import read_bytes
from .headers import INDEX_FILE
from .staging import MANIFEST

COPIED_SUFFIXES = {".json", ".jsonl", ".jinja", ".model", ".txt", ".ppm", ".png", ".jpg", ".jpeg"}
COPIED_PREFIXES = ("LICENSE", "NOTICE", "USE_POLICY")
NOT_COPIED = {INDEX_FILE, MANIFEST, "config.json", "report.json", "adapter_config.json"}
MAX_COPIED_BYTES = 256 * 2**20


def copy_companions(source: Path, target: Path) -> None:
    """Copies what belongs beside the weights from folder to folder; what `target` holds already is kept.

    Of code, modules in the folder itself, where it is named (auto_map) and trusted.  Never weights or pickles; never a
    link that leaves the folder.  Raises InputError for that, and OSError as the disk does.
    """
    code = trusted() and bool(code_of(source))
    for path in sorted([*source.glob("*"), *source.glob("images/*")]):
        relative = path.relative_to(source)
        wanted = path.suffix.lower() in COPIED_SUFFIXES or path.name.startswith(COPIED_PREFIXES)
        wanted |= code and path.suffix == ".py" and path.parent == source
        if not wanted or path.name in NOT_COPIED or path.is_dir() or (target / relative).exists():
            continue
        data = read_bytes(source, str(relative), MAX_COPIED_BYTES)
        (target / relative).parent.mkdir(exist_ok=True)
        (target / relative).write_bytes(data)
