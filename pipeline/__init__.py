"""The run, from a model to a guarded one: extract -> fold -> check -> publish. What Python users call.

One module a verb; what two of them need lies in sources.py, writing.py, examining.py and results.py.
"""

from ..validators.behaviour.making import GuardOptions
from .checking import Served, check_guarded, check_served
from .exporting import export_guarded
from .extracting import extract_guard, extract_to
from .inspecting import inspect_model, trace_family
from .results import Export, NotSafer

__all__ = [
    "Export",
    "GuardOptions",
    "NotSafer",
    "Served",
    "check_guarded",
    "check_served",
    "export_guarded",
    "extract_guard",
    "extract_to",
    "inspect_model",
    "trace_family",
]
