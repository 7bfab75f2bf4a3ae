"""Lets megatron-core run its checkpoint code and its distributed optimizer on CPU ranks.

To be imported before megatron: what asks for CUDA gets the CPU, and streams do nothing.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: _Stream()


def _on_cpu(made: Any) -> Any:
    @functools.wraps(made)
    def make(*args: Any, **options: Any) -> Any:
        if str(options.get("device") or "").startswith("cuda"):
            options["device"] = "cpu"
        return made(*args, **options)

    return make


for _name in (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "zeros_like",
    "empty_like",
):
    setattr(torch, _name, _on_cpu(getattr(torch, _name)))
for _name in ("synchronize", "empty_cache"):
    setattr(torch.cuda, _name, lambda *_, **__: None)
torch.cuda.current_device = lambda: "cpu"
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.Stream = torch.cuda.Event = _Stream
torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: _Stream()
torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self

_type = torch.Tensor.type


def _cuda_type(self: Any, *args: Any, **options: Any) -> Any:
    found = _type(self, *args, **options)
    # Megatron asks whether a parameter's type is that of a CUDA tensor before it buffers it.
    if isinstance(found, str) and "cuda" not in found:
        return found.replace("torch.", "torch.cuda.")
    return found


torch.Tensor.type = _cuda_type
