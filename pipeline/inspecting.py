"""guardfold inspect: what a model is and what writes to its residual stream, from config and headers alone."""

from __future__ import annotations

from pathlib import Path

from ..export.checkpoint.headers import Checkpoint
from ..export.families.table import Family, family_of
from ..export.families.traced_rows import as_toml, family_rows
from ..export.families.tracer import without_memory
from ..guard.base.errors import InputError
from ..guard.base.progress import bar
from ..guard.base.remote_code import trusting_if_asked
from ..guard.model.vlm import meta_model
from ..validators.evidence.batches import comparison_batches
from .sources import headers_of


@trusting_if_asked
def inspect_model(
    model: str, family_file: Path | None = None, *, trust_remote_code: bool = False
) -> tuple[Checkpoint, Family]:
    """Returns the checkpoint and family of `model`, from its config and headers alone; of a model on the hub, nothing
    else is downloaded, and the checkpoint's data cannot be read. Raises InputError if unsupported.
    """
    with headers_of(model) as folder:
        checkpoint = Checkpoint.open(folder)
        return checkpoint, family_of(checkpoint, family_file)


@trusting_if_asked
def trace_family(model: str, *, trust_remote_code: bool = False) -> str:
    """Returns a family file that says what writes to the residual stream of `model`, found by running its class,
    without its weights, on a text and a picture. Raises InputError if transformers cannot build or run it.
    """
    with headers_of(model) as folder:
        built = without_memory(meta_model(folder))
        with bar() as progress:
            progress.add_task("tracing", total=None)
            batches = comparison_batches(built, folder)
            if not batches:
                raise InputError(f"{model}: no prompt that its class runs; add the model's processor to the folder")
            rows = family_rows(built, batches)
    return f"# Traced from {model} on: {', '.join(batches)}.\n{as_toml(rows)}"
