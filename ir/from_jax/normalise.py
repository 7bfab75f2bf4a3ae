"""From the flat program to a draft in the kinds of the op table.

What has no kind keeps JAX's name (`jax.cumsum`): lifting must make it unnecessary, or `check`
reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedOp
from ..graph import SLOTS
from ..lift.draft import Draft, Wire
from ..optable import TABLE as KINDS
from .annotate import pin_of_name, pin_of_sharding
from .call import Call
from .flatten import SLICE, Flat, Node, Source
from .sizes import dims_of, dtype_of
from .translate import ALIASES, HANDLERS


def normalise(flat: Flat, inputs: Sequence[Source], loss: Source, model: str) -> Draft:
    """The draft of a flat program; `model` is the dtype of its parameters."""
    builder = _Builder(model)
    for source in inputs:
        builder.draft.inputs.append(builder.wire(source))
    needed = _needed(flat, loss)
    for node in flat.nodes:
        if node in needed:
            builder.operation(node)
    builder.draft.outputs = [builder.wire(loss)]
    builder.draft.sweep()
    return builder.draft


def _needed(flat: Flat, loss: Source) -> set[Node]:
    found: set[Node] = set()
    waiting = [loss]
    while waiting:
        node = waiting.pop().node
        if node is not None and node not in found:
            found.add(node)
            waiting += node.operands
    return found


class _Builder:
    """Turns nodes into ops, one after the other."""

    def __init__(self, model: str) -> None:
        self.draft = Draft()
        self.model = model
        self.wires: dict[Source, Wire] = {}
        self.slices: dict[str, Wire] = {}

    def wire(self, source: Source) -> Wire:
        """The wire of a source; a leaf gets one when it is first read."""
        if source not in self.wires:
            assert source.node is None, "a node is read before it was made"
            wire = Wire(
                dims_of(source.shape, ()), dtype_of(source.dtype, self.model), source=source
            )
            if source.role == "parameter":
                wire.role, wire.name, wire.carried = "parameter", source.name, True
                wire.grad = wire.is_float
            elif source.role == "input":
                wire.role, wire.name = "input", source.name
            else:
                wire.role = "constant"
            self.wires[source] = wire
        return self.wires[source]

    def operation(self, node: Node) -> None:
        """Adds what a node computes."""
        if node.name == SLICE and self.wire(node.operands[0]).role == "parameter":
            self.wires[node.results[0]] = self.slice(node)
            return
        if node.name == "dim_as_value":
            self._leave(node, Call(self.draft, self.wire, node, self.model).opaque())
            return
        call = Call(self.draft, self.wire, node, self.model)
        made = self._made(call)
        wires = [made] if isinstance(made, Wire) else made
        self._leave(node, call.opaque() if wires is None else wires)

    def _leave(self, node: Node, wires: Sequence[Wire]) -> None:
        for source, wire in zip(node.results, wires, strict=True):
            if wire.source is None:
                wire.source = source
            self.wires[source] = wire

    def _made(self, call: Call) -> Wire | list[Wire] | None:
        name = call.name
        if name in ALIASES or (name == "stop_gradient" and not call.carried):
            return call.wires if len(call.node.results) > 1 else call.wires[0]
        if name == "stop_gradient":
            made = call.add(name, call.wires, call.dims(), call.dtype())
            made.grad = False
            return made
        if name == "name":
            return self._pinned(call, pin_of_name(str(call.params["name"])))
        if name == "sharding_constraint":
            rank = call.wires[0].rank
            return self._pinned(call, pin_of_sharding(call.params["sharding"], rank))
        return HANDLERS[name](call) if name in HANDLERS else None

    def _pinned(self, call: Call, types: dict[str, str]) -> Wire:
        """An identity that lifting does not look through, where there is a pin."""
        (x,) = call.wires
        return call.add("pin", [x], x.dims, types=types) if types and x.carried else x

    def slice(self, node: Node) -> Wire:
        """A layer's own parameter, `wq[3]` of the stack `wq`."""
        stack = self.wire(node.operands[0])
        name = f"{stack.name}[{node.params['index']}]"
        if name not in self.slices:
            self.slices[name] = Wire(
                stack.dims[1:], stack.dtype, stack.grad, True, "parameter", name, node.results[0]
            )
        return self.slices[name]


def check(draft: Draft) -> None:
    """Raises UnsupportedOp for the first op that the table does not have, and for odd sizes."""
    for op in draft.ops:
        where = _where(op.attributes.get("place"), op.module, op.results[0])
        if op.kind not in KINDS:
            name = op.kind.removeprefix("jax.").removeprefix("torch.")
            shapes = ", ".join(str(list(wire.dims)) for wire in op.operands)
            raise UnsupportedOp(
                f"op {name} {where} (operands {shapes}): no rule; to add one: a line or a function "
                "in ir/from_jax/translate.py, in ir/optable.py (its rule) and in the backend's op "
                "table (how to write it)"
            )
        for wire in op.results:
            for size in (n for dim in wire.dims for n in dim):
                if isinstance(size, str) and size not in ("b", "s", SLOTS):
                    raise UnsupportedOp(
                        f"op {op.kind} {where}: a result has a dim of size {size}; sizes must be "
                        "numbers, the batch b or the sequence s"
                    )


def _where(place: Any, module: str, result: Wire) -> str:
    from .flatten import place as line

    source = result.source
    if place is None and isinstance(source, Source) and source.node is not None:
        place = line(source.node.info)
    return f"at {place or module or 'the top level'}"
