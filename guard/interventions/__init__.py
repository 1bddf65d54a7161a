"""Interventions, one file each. Everything that an intervention needs is in its file and its line in KINDS below."""

from __future__ import annotations

from ..base.errors import InputError
from .activation_addition import ActivationAddition
from .base import Candidate, Intervention, Reading
from .gate import Gate
from .linear_gate import LinearGate
from .residual_projection import ResidualProjection
from .shared_projection import SharedProjection
from .sublayer_projection import SublayerProjection
from .two_pass import TwoPass

KINDS: dict[str, type[Intervention]] = {
    cls.kind: cls
    for cls in (
        SublayerProjection,
        SharedProjection,
        ResidualProjection,
        Gate,
        LinearGate,
        TwoPass,
        ActivationAddition,
    )
}
"""What a guard file calls it -> its class."""


def register(cls: type[Intervention]) -> type[Intervention]:
    """Makes `cls`, an intervention of the caller's own, known to guard files; returns it, so that it may decorate one.

    Raises InputError if its kind is taken.
    """
    if KINDS.setdefault(cls.kind, cls) is not cls:
        raise InputError(f"{cls.kind}: an intervention of this kind is known already, {KINDS[cls.kind].__name__}")
    return cls


__all__ = [
    "KINDS",
    "ActivationAddition",
    "Candidate",
    "Gate",
    "Intervention",
    "LinearGate",
    "Reading",
    "ResidualProjection",
    "SharedProjection",
    "SublayerProjection",
    "TwoPass",
    "register",
]
