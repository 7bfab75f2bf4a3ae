"""One node of a flat program: its operands, and ways to add ops for it to the draft."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..graph import Dims, Dtype
from ..lift.dims import reshaped
from ..lift.draft import Draft, Op, Wire
from .evaluate import number_of
from .flatten import Node, Source, place
from .sizes import dims_of, dtype_of

_LEAVES = frozenset(
    {"kernel", "weight", "bias", "scale", "embedding", "w", "b", "g", "gamma", "beta", "value"}
)
"""What a layer calls its own parameters: the layer is what is before it."""

_SCAN = re.compile(r"[^/]*\[\d+\]")


class Call:
    """One node: its operands as wires, and ways to add ops at the end of the draft."""

    def __init__(
        self, draft: Draft, wire_of: Callable[[Source], Wire], node: Node, model: str
    ) -> None:
        self.draft, self.node, self.model = draft, node, model
        self.wire_of = wire_of
        self.name, self.params = node.name, node.params
        self.wires = [wire_of(source) for source in node.operands]
        self.module = _module(self.wires, node.scope)

    @property
    def where(self) -> str:
        """The primitive and its place, for messages."""
        return f"op {self.name} at {place(self.node.info)}"

    @property
    def carried(self) -> bool:
        """Whether a parameter takes part."""
        return any(wire.carried for wire in self.wires)

    def number(self, index: int) -> Any:
        """The Python number that an operand is everywhere, or None."""
        return number_of(self.node.operands[index])

    def dims(self, index: int = 0) -> Dims:
        """Dims of a result."""
        return dims_of(self.node.results[index].shape, [wire.dims for wire in self.wires])

    def dims_of(self, shape: Sequence[Any]) -> Dims:
        """Dims of a traced shape."""
        return dims_of(shape, [wire.dims for wire in self.wires])

    def dtype(self, index: int = 0) -> Dtype:
        """Dtype of a result."""
        return dtype_of(self.node.results[index].dtype, self.model)

    def add(
        self,
        kind: str,
        operands: Sequence[Wire],
        dims: Dims,
        dtype: Dtype | None = None,
        /,
        **attributes: Any,
    ) -> Wire:
        """An op with one result."""
        return self.draft.add(
            kind, operands, dims, dtype=dtype, attributes=attributes, module=self.module
        ).result

    def opaque(self) -> list[Wire]:
        """An op under JAX's own name, with all its results."""
        op = Op(
            f"jax.{self.name}", list(self.wires), [], {"place": place(self.node.info)}, self.module
        )
        for index, source in enumerate(self.node.results):
            wire = Wire(self.dims(index), self.dtype(index), producer=op, source=source)
            wire.carried = self.carried
            wire.grad = wire.is_float and any(w.grad for w in self.wires)
            op.results.append(wire)
        self.draft.ops.append(op)
        return op.results

    def reshape(self, wire: Wire, dims: Dims) -> Wire:
        """A reshape to `dims`, or nothing."""
        dims = reshaped(wire.dims, dims)
        return wire if dims == wire.dims else self.add("reshape", [wire], dims)

    def permute(self, wire: Wire, order: Sequence[int]) -> Wire:
        """Dim `order[i]` becomes dim i, or nothing."""
        order = [int(d) for d in order]
        if order == sorted(order):
            return wire
        return self.add("permute", [wire], tuple(wire.dims[d] for d in order), order=order)

    def broadcast(self, wire: Wire, dims: Dims) -> Wire:
        """A wire repeated along dims of size 1, or nothing."""
        return wire if wire.dims == dims else self.add("expand", [wire], dims)


def _module(wires: Sequence[Wire], scope: str) -> str:
    """The layer whose parameter is read, or the iteration of a scan that this is part of."""
    names = [wire.name for wire in wires if wire.role == "parameter"]
    if names:
        return layer_of(names[0])
    found = _SCAN.search(scope)
    return found[0] if found else ""


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to: `layers.attn.wq.kernel[3]` → `layers[3].attn.wq`,
    the index at the first part of the name where it is a slice of a stack."""
    base, bracket, index = parameter.partition("[")
    parts = base.split(".")
    if len(parts) > 1 and parts[-1] in _LEAVES:
        parts.pop()
    return ".".join(parts) + (bracket + index if bracket else "")
