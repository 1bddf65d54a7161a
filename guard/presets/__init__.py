"""Guards by name. A preset is a file here and its name in BUILT_IN; a kind of intervention with candidates of its own
needs no file.
"""

from __future__ import annotations

from ..interventions import KINDS, Intervention
from . import gate, linear, projection, vlm_guard
from .base import Preset, Round

DEFAULT_PRESET = "auto"
BUILT_IN = (vlm_guard.AUTO, vlm_guard.PRESET, gate.PRESET, linear.PRESET, projection.PRESET)


def presets() -> dict[str, Preset]:
    """Returns name -> preset: those built in, then one for every kind of intervention that has candidates of
    its own.
    """
    own = {kind: _of_kind(cls) for kind, cls in KINDS.items() if "candidates" in vars(cls)}
    return {**{preset.name: preset for preset in BUILT_IN}, **own}


def _of_kind(cls: type[Intervention]) -> Preset:
    return Preset(
        cls.kind,
        (cls.__doc__ or cls.kind).partition("\n")[0].rstrip("."),
        (cls,),
        (Round(cls.kind, f"choosing: {cls.kind}", lambda material, _before: cls.candidates(material)),),
    )


__all__ = ["BUILT_IN", "DEFAULT_PRESET", "Preset", "Round", "presets"]
