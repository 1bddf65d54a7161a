"""Float64 all the way: models cast to float32 inside norms, softmax and rotary embeddings, which hides small errors.

Eager attention needs it with padded rows: float64's smallest number, cast to float32, is -inf, and the row becomes nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Widened(TorchFunctionMode):
    """Wherever float32 is asked for, float64 is given."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **wide)


def widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def exact() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Widened():
            yield
    finally:
        torch.set_default_dtype(before)
