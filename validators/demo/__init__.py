"""The demo: a LLaVA of a million parameters, trained here from a seed, with a real (engineered) alignment gap."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEMO"]

DEMO = Path(__file__).parent / "model"
"""The shipped folder, built with seed 0: weights, processor, anchors, probes, image questions, benign prompts."""
