"""Tracing PyTorch modules: `trace(module, example_inputs, loss=...)` → `Model`."""

from .trace import trace
from .widen import Widen

__all__ = ["Widen", "trace"]
