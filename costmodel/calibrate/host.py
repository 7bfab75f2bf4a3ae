"""What the host spends on one call of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .clock import Clock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCKS = 8
_ELEMENTS = 64
_REPEATS = 15
_CALLS = 12
"""Of one block of `_step`: six ops forward, and the backward pass of each."""


def host_s_per_call(clock: Clock) -> float:
    """Seconds of host per call of an op in a step of modules so small that nothing else takes
    time: modules, dispatcher, autograd and, on a GPU, the driver."""
    return clock.host_seconds(_step(clock.device), _REPEATS) / (_CALLS * _BLOCKS)


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
            added: Tensor = self.down(functional.silu(self.up(normed)) * normed)
            return x + added

    model = nn.Sequential(*(Block() for _ in range(_BLOCKS))).to(device)
    x = torch.randn(1, _ELEMENTS, device=device, requires_grad=True)
    gradient = torch.ones_like(x)
    return lambda: model(x).backward(gradient)
