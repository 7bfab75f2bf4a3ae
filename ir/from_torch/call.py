"""One call of a traced graph: its arguments by name, and ways to add ops for it to the draft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import UnsupportedOp
from ..graph import Dims, Dtype
from ..lift.dims import reshaped
from ..lift.draft import Draft, Op, Wire
from .dims import dims_of
from .optable import TABLE

DTYPES: dict[torch.dtype, Dtype] = {
    torch.bfloat16: "model",
    torch.float16: "model",
    torch.float32: "wide",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
    torch.complex64: "wide",  # of rotary tables, lifted away
    torch.complex128: "wide",
}


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path and not path.startswith("_empty"):
            return str(path).removeprefix("model").removeprefix(".")
    return ""


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by their names in torch's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
    return bound | dict(node.kwargs)


class Call:
    """One call: its arguments, and ways to add ops at the end of the draft."""

    def __init__(
        self,
        draft: Draft,
        wires: Mapping[fx.Node, Wire | list[Wire]],
        symbols: Mapping[str, str],
        node: fx.Node,
    ) -> None:
        self.draft, self.wires, self.symbols, self.node = draft, wires, symbols, node
        self.name = str(node.target).removeprefix("aten.").split(".")[0]
        self.args = _arguments(node)
        self.module = module_of(node)

    @property
    def where(self) -> str:
        """The op and its place, for messages."""
        return f"op aten.{self.name} at {self.module or 'the top level'}"

    def wire(self, name: str) -> Wire:
        """The tensor argument of this name."""
        found = self.wires[self.args[name]]
        assert isinstance(found, Wire)
        return found

    def optional(self, name: str) -> Wire | None:
        """The tensor argument of this name, if it was given."""
        return self.wire(name) if isinstance(self.args.get(name), fx.Node) else None

    def tensors(self) -> list[Wire]:
        """All tensors that the call reads."""
        found: list[Wire] = []
        for node in self.node.all_input_nodes:
            wires = self.wires.get(node, [])
            found += wires if isinstance(wires, list) else [wires]
        return found

    def number(self, name: str) -> float | int | None:
        """A Python number, or None where the argument is a tensor. A symbol has no rule."""
        value = self.args[name]
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), Tensor):
            raise UnsupportedOp(
                f"{self.where}: an operand is computed from the batch size or sequence length"
            )
        return None

    def dims(self, *operands: Wire) -> Dims:
        """Dims of the call's result."""
        return self.dims_of(self.node.meta["val"], *operands)

    def dims_of(self, value: Any, *operands: Wire) -> Dims:
        """Dims of a traced tensor, products of symbols ordered as in the operands."""
        return dims_of(value.shape, self.symbols, tuple(wire.dims for wire in operands))

    def dtype(self) -> Dtype:
        """Dtype of the call's result."""
        return DTYPES.get(self.node.meta["val"].dtype, "int64")

    def add(
        self,
        kind: str,
        operands: list[Wire],
        dims: Dims,
        dtype: Dtype | None = None,
        /,
        **attributes: Any,
    ) -> Wire:
        """An op with one result."""
        draft = self.draft
        return draft.add(
            kind, operands, dims, dtype=dtype, attributes=attributes, module=self.module
        ).result

    def opaque(self) -> Wire | list[Wire]:
        """An op under torch's own name."""
        return self.opaque_list() if self._is_list() else self.opaque_list()[0]

    def _is_list(self) -> bool:
        return not isinstance(self.node.meta["val"], Tensor)

    def opaque_list(self) -> list[Wire]:
        """An op under torch's own name, with all its results."""
        value = self.node.meta["val"]
        values = [value] if isinstance(value, Tensor) else list(value)
        operands = self.tensors()
        op = Op(f"aten.{self.name}", operands, [], {}, self.module)
        for each in values:
            dims = self.dims_of(each, *operands)
            wire = Wire(dims, DTYPES.get(each.dtype, "int64"), producer=op, source=self.node)
            wire.carried = any(w.carried for w in operands)
            wire.grad = wire.is_float and any(w.grad for w in operands)
            op.results.append(wire)
        self.draft.ops.append(op)
        return op.results

    def from_table(self) -> Wire:
        """An op as the table of this folder says."""
        line = TABLE[self.name]
        operands = [w for name in line.operands if (w := self.optional(name))]
        attributes = {ours: self.args.get(theirs) for ours, theirs in line.attributes.items()}
        return self.add(line.kind, operands, self.dims(*operands), self.dtype(), **attributes)

    def cast(self) -> Wire:
        """A change of dtype, or nothing."""
        wire = self.tensors()[0]
        dtype = self.dtype()
        return wire if dtype == wire.dtype else self.add("cast", [wire], wire.dims, dtype, to=dtype)

    def reshape(self, wire: Wire, dims: Dims | None = None) -> Wire:
        """A reshape to the call's result or to `dims`, or nothing."""
        dims = reshaped(wire.dims, self.dims(wire) if dims is None else dims)
        return wire if dims == wire.dims else self.add("reshape", [wire], dims)

    def expand(self) -> Wire:
        """Dims of size 1 repeated, or nothing."""
        wire = self.tensors()[0]
        dims = self.dims(wire)
        return wire if dims == wire.dims else self.add("expand", [wire], dims)

    def permute(self, wire: Wire, order: list[int]) -> Wire:
        """Dim `order[i]` becomes dim i, or nothing."""
        order = [d % wire.rank for d in order]
        if order == sorted(order):
            return wire
        return self.add("permute", [wire], tuple(wire.dims[d] for d in order), order=order)
