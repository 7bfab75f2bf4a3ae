"""Casts to "at least float32", widened: what makes a float64 comparison exact.

Hugging Face models cast logits, norms and rotary angles to float32. Run in float64, those casts
throw half of the digits away: 4e-8 in the loss. Inside `Widen`, whatever asks for float32 gets
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Widen(TorchFunctionMode):
    """A context in which float32 means float64, for models and inputs that are float64.

    Example:
        model.double()
        with Widen():
            loss = model(input_ids=ids, labels=labels).loss
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **wide)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
