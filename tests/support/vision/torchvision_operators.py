"""Importing this makes torchvision importable beside a torch that its compiled part was not built for.

A CPU build of torch with the torchvision that package indices carry is such a pair. Processors use torchvision's Python
alone; of the compiled part it is enough that the operators are declared of which torchvision registers shapes.
"""

import sys

import torch

SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    DECLARED = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        DECLARED.define(f"{operator}{SIGNATURE}")
    import torchvision  # noqa: F401
