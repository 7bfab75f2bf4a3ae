"""The judge of a verification: the original torch module on one device.

Its parameters are perturbed first (a bias that is zero, or a norm's weight that is one, would hide
that a program forgot it), and dropout is off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...ir.errors import InvalidInput
from ...ir.from_torch.export import example_of
from ...ir.from_torch.widen import Widen

Loss = Callable[..., Tensor]
"""From a module's output, and the inputs that its forward does not take, to the mean loss."""

PERTURBATION = 0.02


class Reference:
    """A module with perturbed weights, and its loss and gradients on a batch.

    The module given stays as it is. Raises InvalidInput for one without values (on meta), unless it
    is Hugging Face's, which its config is enough to make.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        loss: Loss | None = None,
        used: Collection[str] | None = None,
    ) -> None:
        """`used` names the parameters that count, where the module has others that it never reads
        (default: all)."""
        self.used = used
        self.module = _with_values(module).to("cpu", dtype).eval()
        self.dtype = dtype
        self.loss = loss
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(PERTURBATION * noise)

    def save(self, path: Path) -> None:
        """Writes the weights as plain safetensors, tied ones under each of their names."""
        weights = {n: p.detach().clone().contiguous() for n, p in self._named_parameters()}
        save_file(weights, path)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that are used, tied ones under each of their names."""
        named = list(self.module.named_parameters(remove_duplicate=False))
        if self.used is None:
            return named
        counted = {id(p) for name, p in named if name in self.used}
        return [(name, p) for name, p in named if id(p) in counted]

    def run(self, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of a batch, and the gradient under each name of each parameter."""
        inputs = example_of(self.module, batch, self.loss)
        self.module.zero_grad()
        with _widened(self.dtype):
            output = self.module(**inputs.forward)
            loss = _scalar(self.loss(output, *inputs.loss.values()) if self.loss else output)
        loss.backward()
        return loss.item(), {
            name: p.grad if p.grad is not None else torch.zeros_like(p)
            for name, p in self._named_parameters()
            if p.requires_grad
        }


def _with_values(module: nn.Module) -> nn.Module:
    """A copy of a module that has values."""
    tensors = [*module.parameters(), *module.buffers()]
    if not any(tensor.is_meta for tensor in tensors):
        return copy.deepcopy(module)
    config = getattr(module, "config", None)
    if config is None:
        raise InvalidInput(
            f"{type(module).__name__} is on meta: verification needs a model with values"
        )
    made: nn.Module = type(module)(config)
    return made


def _widened(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return Widen() if dtype is torch.float64 else nullcontext()


def _scalar(output: Any) -> Tensor:
    """A module's scalar output, or the `loss` of its output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InvalidInput(
            f"the model returns {type(output).__name__} and no scalar loss: give `loss=` as well"
        )
    return loss
