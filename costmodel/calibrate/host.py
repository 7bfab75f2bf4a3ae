"""What the host spends per kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...ir.optable import Work
from ..kernels import work_class
from .clock import Clock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCKS = 8
_ELEMENTS = 64
_REPEATS = 15
_LAYER: tuple[Work, ...] = (
    "normalisation", "contraction", "pointwise", "pointwise", "contraction", "pointwise",
)  # fmt: skip
"""The ops of one block of `_step`, as the cost model counts their kernels."""


def host_s_per_kernel(clock: Clock) -> float:
    """Seconds of host per kernel in a step of modules so small that nothing else takes time:
    modules, dispatcher, autograd and, on a GPU, the driver."""
    each = [work_class(work) for work in _LAYER]
    kernels = sum(c.forward_launches + c.backward_launches for c in each)
    return clock.host_seconds(_step(clock.device), _REPEATS) / (kernels * _BLOCKS)


def _step(device: torch.device) -> Callable[[], object]:
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(_ELEMENTS)
            self.up = nn.Linear(_ELEMENTS, _ELEMENTS, bias=False)
            self.down = nn.Linear(_ELEMENTS, _ELEMENTS, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            normed = self.norm(x)
            return x + self.down(functional.silu(self.up(normed)) * normed)

    model = nn.Sequential(*(Block() for _ in range(_BLOCKS))).to(device)
    x = torch.randn(1, _ELEMENTS, device=device, requires_grad=True)
    gradient = torch.ones_like(x)
    return lambda: model(x).backward(gradient)
