"""Values of buffers, also of models that were built on meta."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def real_buffers(module: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """Path → values, where they can be had; `twin` is the (shortened) copy.

    Buffers of Hugging Face models on meta are computed by the initialisation of the module that
    owns them, on the CPU. What stays on meta is an error only if the graph depends on it.
    """
    found: dict[str, Tensor] = {}
    for path, child in twin.named_modules():
        if not any(b is not None for b in child._buffers.values()):
            continue
        source = module.get_submodule(path)
        if any(b is not None and b.is_meta for b in source._buffers.values()):
            source = _filled(module, source)
        for name, buffer in source._buffers.items():
            if buffer is not None:
                found[f"{path}.{name}" if path else name] = (
                    buffer.detach().cpu() if not buffer.is_meta else buffer
                )
    return found


def _filled(module: nn.Module, owner: nn.Module) -> nn.Module:
    """A copy of the owner whose buffers are real, if the model's class can compute them."""
    initialise = getattr(module, "_init_weights", None)
    if initialise is None:
        return owner
    memo: dict[int, Any] = {
        id(b): torch.full(b.shape, float("nan"), dtype=b.dtype) if b.is_floating_point()
        else torch.zeros(b.shape, dtype=b.dtype)
        for b in owner._buffers.values() if b is not None and b.is_meta
    }  # fmt: skip
    memo |= {id(p): nn.Parameter(p.detach().to("meta")) for p in owner.parameters()}
    filled = copy.deepcopy(owner, memo)
    with torch.no_grad():
        initialise(filled)
    for name, buffer in filled._buffers.items():
        if buffer is not None and buffer.is_floating_point() and bool(buffer.isnan().any()):
            filled._buffers[name] = owner._buffers[name]
    return filled
