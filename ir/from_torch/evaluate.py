"""Evaluates the gradient-free part of an exported graph for small sizes, as lifting asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import UnsupportedOp
from ..lift.evaluate import Array, NoValue, missing_first
from .export import Exported

_FLOATS = {torch.float16, torch.bfloat16, torch.float32}


@dataclass(slots=True)
class Evaluation:
    """Values of nodes for one setting (`ir.lift.evaluate.Evaluation`)."""

    exported: Exported
    sizes: Mapping[str, int]
    inputs: Mapping[str, Array]
    substitute: Mapping[int, int] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def __call__(self, source: fx.Node) -> Array:
        """The value of a node. Raises NoValue where it has none without parameters."""
        return np.asarray(self._value(source).numpy())

    def _value(self, node: fx.Node) -> Any:
        for at in missing_first(node, lambda each: each.all_input_nodes, self.values):
            self.values[at] = self._compute(at)
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node)
        substitute = self.substitute if _is_arithmetic(node) else {}

        def value(item: Any) -> Any:
            if isinstance(item, fx.Node):
                return self.values[item]
            if isinstance(item, torch.dtype):
                return torch.float64 if item in _FLOATS else item
            if isinstance(item, torch.device):
                return torch.device("cpu")
            if type(item) is int:
                return substitute.get(item, item)
            if isinstance(item, (list, tuple)):
                return type(item)(value(each) for each in item)
            return item

        if not callable(node.target):
            raise NoValue(node.name)
        args = [value(item) for item in node.args]
        kwargs = {name: value(item) for name, item in node.kwargs.items()}
        kwargs.pop("pin_memory", None)
        if "_assert_tensor_metadata" in str(node.target):
            return None
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _placeholder(self, node: fx.Node) -> Tensor:
        if name := self.exported.inputs.get(node):
            return torch.from_numpy(self.inputs[name])
        if node in self.exported.constants:
            path, tensor = self.exported.constants[node]
            if tensor.is_meta:
                raise UnsupportedOp(
                    f"buffer {path} is on meta and has no values, which the graph depends on: "
                    "build the module with real buffers (parameters may stay on meta)"
                )
            return tensor.double() if tensor.dtype in _FLOATS else tensor
        raise NoValue(node.name)


_ARITHMETIC = ("sub", "add", "lt", "le", "gt", "ge", "rsub", "floor_divide", "remainder", "triu",
               "tril")  # fmt: skip


def _is_arithmetic(node: fx.Node) -> bool:
    return str(node.target).removeprefix("aten.").split(".")[0].strip("_") in _ARITHMETIC


@dataclass(frozen=True, slots=True)
class Evaluations:
    """Makes evaluations of an exported graph (`ir.lift.evaluate.Settings`)."""

    exported: Exported

    def __call__(
        self,
        b: int = 2,
        s: int = 7,
        seed: int = 0,
        substitute: Mapping[int, int] | None = None,
        known: Mapping[Any, Array] | None = None,
        **inputs: Array,
    ) -> Evaluation:
        """An evaluation; inputs that are not given are drawn."""
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[str, Array] = {}
        sizes = {"b": b, "s": s}
        for node, name in self.exported.inputs.items():
            traced = node.meta["val"]
            shape = [n if isinstance(n, int) else sizes[self.exported.symbols[str(n.node.expr)]]
                     for n in traced.shape]  # fmt: skip
            if traced.dtype is torch.bool or "mask" in name:
                value = torch.ones(shape, dtype=traced.dtype)
            elif traced.is_floating_point():
                value = torch.rand(shape, generator=generator, dtype=torch.float64)
            else:
                value = torch.randint(1, 5, shape, generator=generator).to(traced.dtype)
            drawn[name] = inputs.get(name, value.numpy())
        values = {node: torch.from_numpy(value) for node, value in (known or {}).items()}
        return Evaluation(self.exported, sizes, drawn, dict(substitute or {}), values)

    def constants(self, source: fx.Node) -> set[int]:
        """Integers > 1 that take part in the arithmetic which a node depends on."""
        seen: set[fx.Node] = set()
        found: set[int] = set()
        todo = [source]
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            todo += at.all_input_nodes
            if _is_arithmetic(at):
                found |= {abs(a) for a in at.args if type(a) is int and abs(a) > 1}
        return found
