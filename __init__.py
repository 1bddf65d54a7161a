"""guardfold: a vision-language model's safety guard, folded into plain weights.

>>> import guardfold
>>> result = guardfold.export_guarded("demo", output="demo-guarded")
>>> result.evidence.ruling
"""

from __future__ import annotations

from typing import Any

from ._version import __version__

__all__ = ["__version__", "export_guarded", "extract_guard"]


def __getattr__(name: str) -> Any:
    """Returns the pipeline's functions, imported when first used: torch takes a second that `--version` need not wait
    for.
    """
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
