"""From the exported nodes to a draft in the kinds of the op table.

What has no kind keeps torch's name: lifting must make it unnecessary, or `check` reports it.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from ..errors import UnsupportedOp
from ..graph import Dims
from ..lift.draft import Draft, Wire
from ..optable import TABLE as KINDS
from .annotate import PIN_OP
from .call import DTYPES, Call, module_of
from .dims import dims_of
from .export import Exported
from .optable import ALIASES, CASTS, EXPANDS, MORE_VIEWS, TABLE, VIEWS
from .translate import HANDLERS


def normalise(
    exported: Exported, names: Mapping[nn.Parameter, str], frozen: frozenset[str]
) -> tuple[Draft, Wire]:
    """The draft and the wire of the loss; `names` gives each parameter its logical name."""
    builder = _Builder(exported)
    for node in exported.nodes:
        if node.op == "placeholder":
            if node in exported.parameters:
                name = names[exported.parameters[node]]
                builder.parameter(node, name, name not in frozen)
            else:
                builder.leaf(node)
        else:
            builder.operation(node)
    loss = builder.wires[exported.loss]
    assert isinstance(loss, Wire)
    builder.draft.outputs = [loss]
    builder.draft.sweep()
    return builder.draft, loss


class _Builder:
    """Turns nodes into ops, one after the other."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.draft = Draft()
        self.wires: dict[fx.Node, Wire | list[Wire]] = {}
        self.tied: dict[str, Wire] = {}

    def parameter(self, node: fx.Node, name: str, trainable: bool) -> None:
        """A tied parameter is one wire."""
        if name not in self.tied:
            dims = self._dims(node.meta["val"], ())
            self.tied[name] = Wire(dims, "model", trainable, True, "parameter", name, node)
        self.wires[node] = self.tied[name]

    def leaf(self, node: fx.Node) -> None:
        """An input, a buffer or a constant."""
        value = node.meta["val"]
        wire = Wire(self._dims(value, ()), DTYPES.get(value.dtype, "int64"), source=node)
        if name := self.exported.inputs.get(node):
            wire.role, wire.name = "input", name
            self.draft.inputs.append(wire)
        else:
            wire.role, wire.name = "constant", self.exported.constants[node][0]
        self.wires[node] = wire

    def operation(self, node: fx.Node) -> None:
        """Adds what a call computes."""
        value = node.meta.get("val")
        if node.target is operator.getitem:
            pieces = self.wires.get(node.args[0])  # type: ignore[arg-type]
            if isinstance(pieces, list):
                self.wires[node] = pieces[node.args[1]]  # type: ignore[index]
                pieces[node.args[1]].source = node  # type: ignore[index]
            return
        if not isinstance(value, (Tensor, list, tuple)):
            return  # sizes: the shapes already have them
        if str(node.target).startswith(PIN_OP):
            self._pin(node)
            return
        call = Call(self.draft, self.wires, self.exported.symbols, node)
        if call.name.endswith("_") and not call.name.startswith("_"):
            self._check_in_place(call)
            call.name = call.name.removesuffix("_")
        try:
            made = _translate(call)
        except UnsupportedOp:
            if any(wire.carried for wire in call.tensors()):
                raise
            made = call.opaque()  # a mask or a table: it will be evaluated
        if node.meta.get("no_grad"):
            for wire in made if isinstance(made, list) else [made]:
                wire.grad = False
        if isinstance(made, Wire) and made.source is None:
            made.source = node
        self.wires[node] = made

    def _pin(self, node: fx.Node) -> None:
        """`sw.annotate` of an activation: an identity that lifting does not look through."""
        wire = self.wires[node.args[0]]  # type: ignore[index]
        assert isinstance(wire, Wire)
        op = self.draft.add(
            "pin", [wire], wire.dims, module=module_of(node),
            attributes={"types": json.loads(str(node.args[1]))}, source=node,
        )  # fmt: skip
        self.wires[node] = op.result

    def _check_in_place(self, call: Call) -> None:
        """An update in place is one of values if nobody reads the old ones, or a view of them."""
        family = _family(call.node.args[0])
        if any(user > call.node for node in family for user in node.users if user not in family):
            raise UnsupportedOp(
                f"{call.where}: it changes a tensor in place of which a view, or the old value, is "
                "read afterwards; write it without the underscore"
            )

    def _dims(self, value: Any, operands: tuple[Dims, ...]) -> Dims:
        return dims_of(value.shape, self.exported.symbols, operands)


def _translate(call: Call) -> Wire | list[Wire]:
    name = call.name
    if name in ALIASES:
        return call.tensors()[0]
    if name in CASTS:
        return call.cast()
    if name in VIEWS:
        return call.reshape(call.tensors()[0])
    if name in EXPANDS:
        return call.expand()
    if name in HANDLERS:
        return HANDLERS[name](call)
    return call.from_table() if name in TABLE else call.opaque()


def _family(node: Any) -> set[fx.Node]:
    """The nodes that are views of one tensor, and that tensor."""
    assert isinstance(node, fx.Node)
    while _is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    found, todo = {node}, [node]
    while todo:
        more = [user for user in todo.pop().users if _is_view(user) and user not in found]
        found.update(more)
        todo += more
    return found


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_view(source)
    name = str(node.target).removeprefix("aten.").split(".")[0]
    return name in VIEWS | EXPANDS | ALIASES | MORE_VIEWS


def check(draft: Draft) -> None:
    """Raises UnsupportedOp for the first op that the table does not have, and for odd sizes."""
    for op in draft.ops:
        where = f"at {op.module or 'the top level'}"
        if op.kind not in KINDS:
            name = op.kind.removeprefix("torch.").removeprefix("aten.")
            shapes = ", ".join(str(list(wire.dims)) for wire in op.operands)
            raise UnsupportedOp(
                f"op {name} {where} (operands {shapes}): no rule; to add one: a line in "
                "ir/from_torch/optable.py (its name here), in ir/optable.py (its rule) and in the "
                "backend's op table (how to write it)"
            )
        for wire in op.results:
            for dim in wire.dims:
                for size in dim:
                    if isinstance(size, str) and size not in ("b", "s"):
                        raise UnsupportedOp(
                            f"op {op.kind} {where}: a result has a dim of size {size}; sizes must "
                            "be numbers, the batch b or the sequence s"
                        )
