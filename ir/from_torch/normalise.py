"""From the exported nodes to a draft in the kinds of the op table.

What has no kind keeps torch's name: lifting must make it unnecessary, or `check` reports it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedOp
from ..graph import Dims, Dtype
from ..optable import TABLE as KINDS
from .dims import dims_of, reshaped
from .draft import Draft, Op, Wire
from .export import Exported
from .optable import ALIASES, CASTS, EXPANDS, TABLE, VIEWS

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.bfloat16: "model",
    torch.float16: "model",
    torch.float32: "wide",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


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


def module_of(node: fx.Node) -> str:
    """The path of the innermost module that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path and not path.startswith("_empty"):
            return str(path).removeprefix("model").removeprefix(".")
    return ""


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
        wire = Wire(self._dims(value, ()), _DTYPES.get(value.dtype, "int64"), source=node)
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
        name = str(node.target).removeprefix("aten.").split(".")[0]
        call = Call(self, node, name, _bound(node))
        if name.endswith("_") and not name.startswith("_"):
            name = call.name = self._functional(node, name)
        try:
            made = self._translate(call, name)
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

    @staticmethod
    def _translate(call: Call, name: str) -> Wire | list[Wire]:
        if name in ALIASES:
            return call.tensors()[0]
        if name in CASTS:
            return call.cast()
        if name in VIEWS:
            return call.reshape(call.tensors()[0])
        if name in EXPANDS:
            return call.expand()
        if name in _HANDLERS:
            return _HANDLERS[name](call)
        return call.from_table() if name in TABLE else call.opaque()

    @staticmethod
    def _functional(node: fx.Node, name: str) -> str:
        """The name without the `_`: an update in place whose old value nobody reads later."""
        target = node.args[0]
        assert isinstance(target, fx.Node)
        if any(user is not node and _later(user, node) for user in target.users):
            raise UnsupportedOp(
                f"op aten.{name} at {module_of(node) or 'the top level'}: it changes a tensor in "
                f"place that is read afterwards; write it as x = x.{name.rstrip('_')}(...)"
            )
        return name.removesuffix("_")

    def _dims(self, value: Any, operands: tuple[Dims, ...]) -> Dims:
        return dims_of(value.shape, self.exported.symbols, operands)


def _later(user: fx.Node, node: fx.Node) -> bool:
    return bool(user > node)


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments by their names in torch's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(node.kwargs)
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound |= {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}
    return bound | dict(node.kwargs)


class Call:
    """One call: its arguments, and ways to add ops at the end of the draft."""

    def __init__(self, builder: _Builder, node: fx.Node, name: str, args: dict[str, Any]) -> None:
        self.builder, self.node, self.name, self.args = builder, node, name, args
        self.module = module_of(node)

    def wire(self, name: str) -> Wire:
        """The tensor argument of this name."""
        found = self.builder.wires[self.args[name]]
        assert isinstance(found, Wire)
        return found

    def optional(self, name: str) -> Wire | None:
        """The tensor argument of this name, if it was given."""
        return self.wire(name) if isinstance(self.args.get(name), fx.Node) else None

    def tensors(self) -> list[Wire]:
        """All tensors that the call reads."""
        found: list[Wire] = []
        for node in self.node.all_input_nodes:
            wires = self.builder.wires.get(node, [])
            found += wires if isinstance(wires, list) else [wires]
        return found

    def number(self, name: str) -> float | int | None:
        """A Python number, or None where the argument is a tensor. A symbol has no rule."""
        value = self.args[name]
        if isinstance(value, (int, float)):
            return value
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), Tensor):
            raise UnsupportedOp(
                f"op aten.{self.name} at {self.module or 'the top level'}: an operand is computed "
                "from the batch size or sequence length"
            )
        return None

    def dims(self, *operands: Wire) -> Dims:
        """Dims of the call's result."""
        return self.builder._dims(self.node.meta["val"], tuple(w.dims for w in operands))

    def dtype(self) -> Dtype:
        """Dtype of the call's result."""
        return _DTYPES.get(self.node.meta["val"].dtype, "int64")

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
        draft = self.builder.draft
        return draft.add(
            kind, operands, dims, dtype=dtype, attributes=attributes, module=self.module
        ).result

    def opaque(self) -> Wire | list[Wire]:
        """An op under torch's own name."""
        value = self.node.meta["val"]
        values = [value] if isinstance(value, Tensor) else list(value)
        operands = self.tensors()
        op = Op(f"aten.{self.name}", operands, [], {}, self.module)
        for each in values:
            dims = self.builder._dims(each, tuple(w.dims for w in operands))
            wire = Wire(dims, _DTYPES.get(each.dtype, "int64"), producer=op, source=self.node)
            wire.carried = any(w.carried for w in operands)
            wire.grad = wire.is_float and any(w.grad for w in operands)
            op.results.append(wire)
        self.builder.draft.ops.append(op)
        return op.results[0] if isinstance(value, Tensor) else op.results

    def from_table(self) -> Wire:
        line = TABLE[self.name]
        operands = [w for name in line.operands if (w := self.optional(name))]
        attributes = {ours: self.args.get(theirs) for ours, theirs in line.attributes.items()}
        return self.add(line.kind, operands, self.dims(*operands), self.dtype(), **attributes)

    def cast(self) -> Wire:
        wire = self.tensors()[0]
        dtype = self.dtype()
        return wire if dtype == wire.dtype else self.add("cast", [wire], wire.dims, dtype, to=dtype)

    def reshape(self, wire: Wire, dims: Dims | None = None) -> Wire:
        dims = reshaped(wire.dims, self.dims(wire) if dims is None else dims)
        return wire if dims == wire.dims else self.add("reshape", [wire], dims)

    def expand(self) -> Wire:
        wire = self.tensors()[0]
        dims = self.dims(wire)
        return wire if dims == wire.dims else self.add("expand", [wire], dims)

    def permute(self, wire: Wire, order: list[int]) -> Wire:
        order = [d % wire.rank for d in order]
        if order == sorted(order):
            return wire
        return self.add("permute", [wire], tuple(wire.dims[d] for d in order), order=order)


def _binary(call: Call) -> Wire:
    """add, sub, mul, div and rsub: with a tensor or with a number."""
    x, number = call.wire("self"), call.number("other")
    alpha = call.args.get("alpha", 1)
    if call.name == "div" and call.args.get("rounding_mode"):
        return call.opaque()  # type: ignore[return-value]
    if number is not None:
        if call.name == "mul":
            return call.add("scale", [x], x.dims, call.dtype(), factor=number)
        if call.name == "div":
            return call.add("scale", [x], x.dims, call.dtype(), factor=1 / number)
        if call.name == "rsub":
            x = call.add("neg", [x], x.dims)
            return call.add("shift", [x], x.dims, call.dtype(), term=number)
        sign = -1 if call.name == "sub" else 1
        return call.add("shift", [x], x.dims, call.dtype(), term=sign * alpha * number)
    y = call.wire("other")
    if call.name == "rsub":
        x, y = y, x
    if alpha != 1:
        y = call.add("scale", [y], y.dims, factor=alpha)
    if call.name == "mul" and x is y:
        return call.add("power", [x], x.dims, exponent=2)
    kind = "sub" if call.name == "rsub" else call.name
    return call.add(kind, [x, y], call.dims(x, y), call.dtype())


def _power(call: Call) -> Wire:
    if call.name == "square":
        exponent: Any = 2
    else:
        exponent = call.args["exponent"]
    if not isinstance(exponent, (int, float)):
        return call.opaque()  # type: ignore[return-value]
    x = call.wire("self")
    return call.add("power", [x], x.dims, exponent=exponent)


def _linear(call: Call) -> Wire:
    x, bias = call.wire("input"), call.optional("bias")
    y = call.add("linear", [x, call.wire("weight")], call.dims(x))
    return y if bias is None else call.add("add", [y, bias], y.dims)


def _addmm(call: Call) -> Wire:
    if call.args["beta"] != 1 or call.args["alpha"] != 1:
        return call.opaque()  # type: ignore[return-value]
    x, w, bias = call.wire("mat1"), call.wire("mat2"), call.wire("self")
    kind = "linear_io" if w.role == "parameter" else "matmul"
    y = call.add(kind, [x, w], call.dims(x))
    return call.add("add", [y, bias], y.dims)


def _matmul(call: Call) -> Wire:
    """A product with a parameter is a linear layer."""
    x, w = call.wire("self"), call.wire("other" if "other" in call.args else "mat2")
    if w.rank == 2 and x.rank >= 2:
        if w.role == "parameter":
            return call.add("linear_io", [x, w], call.dims(x))
        turned = w.made_by("permute")
        if turned and turned.operands[0].role == "parameter":
            return call.add("linear", [x, turned.operands[0]], call.dims(x))
    if x.rank < 2 or w.rank < 2:
        return call.opaque()  # type: ignore[return-value]
    return call.add("matmul", [x, w], call.dims(x, w), call.dtype())


def _transpose(call: Call) -> Wire:
    x = call.tensors()[0]
    order = list(range(x.rank))
    if call.name == "t":
        order.reverse()
    elif call.name == "permute":
        order = list(call.args["dims"])
    elif call.name == "movedim":
        source, target = call.args["source"], call.args["destination"]
        sources = [d % x.rank for d in ([source] if isinstance(source, int) else source)]
        targets = [d % x.rank for d in ([target] if isinstance(target, int) else target)]
        order = [d for d in order if d not in sources]
        for where, what in sorted(zip(targets, sources, strict=True)):
            order.insert(where, what)
    else:
        names = ("dim0", "dim1") if "dim0" in call.args else ("axis0", "axis1")
        a, b = (call.args[name] % x.rank for name in names)
        order[a], order[b] = order[b], order[a]
    return call.permute(x, order)


def _slice(call: Call) -> Wire:
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    dims = call.dims(x)
    if dims == x.dims:
        return x
    start, stop, step = call.args["start"] or 0, call.args["end"], call.args["step"]
    if step != 1 or not isinstance(start, int):
        return call.opaque()  # type: ignore[return-value]
    if all(isinstance(size, int) for size in x.dims[dim] + dims[dim]):
        whole, part = prod(x.dims[dim]), prod(dims[dim])  # type: ignore[arg-type]
        start = max(0, start + whole) if start < 0 else start
        stop = start + part
    elif isinstance(stop, int) and stop > 2**62:
        stop = -1
    else:
        stop = "".join(map(str, dims[dim]))
    return call.add("slice", [x], dims, dim=dim, start=start, stop=stop)


def _select(call: Call) -> Wire:
    """One index of a dim: a slice of length 1 without its dim."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    index = call.args["index"]
    size = x.dims[dim]
    if not isinstance(index, int) or not all(isinstance(n, int) for n in size):
        return call.opaque()  # type: ignore[return-value]
    index %= prod(size)  # type: ignore[arg-type]
    dims = tuple(() if i == dim else d for i, d in enumerate(x.dims))
    piece = call.add("slice", [x], dims, dim=dim, start=index, stop=index + 1)
    return call.reshape(piece, tuple(d for i, d in enumerate(x.dims) if i != dim))


def _split(call: Call) -> list[Wire]:
    """chunk, split, unbind: equal pieces are a chunk, unequal ones are slices."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    values = call.node.meta["val"]
    every = [call.builder._dims(value, (x.dims,)) for value in values]
    draft = call.builder.draft
    if call.name == "unbind":
        kept = tuple(() if i == dim else d for i, d in enumerate(x.dims))
        op = draft.add("chunk", [x], [kept] * len(every), count=len(every), module=call.module,
                       attributes={"dim": dim, "count": len(every)})  # fmt: skip
        return [call.reshape(piece, dims) for piece, dims in zip(op.results, every, strict=True)]
    if len(every) == 1:
        return [x]
    if all(dims == every[0] for dims in every):
        attributes = {"dim": dim, "count": len(every)}
        return draft.add(
            "chunk", [x], every, count=len(every), module=call.module, attributes=attributes
        ).results
    pieces, start = [], 0
    for dims in every:
        if not all(isinstance(size, int) for size in dims[dim]):
            return call.opaque()  # type: ignore[return-value]
        stop = start + prod(dims[dim])  # type: ignore[arg-type]
        pieces.append(call.add("slice", [x], dims, dim=dim, start=start, stop=stop))
        start = stop
    return pieces


def _cat(call: Call) -> Wire:
    """cat and stack."""
    wires = [call.builder.wires[node] for node in call.args["tensors"]]
    dims = call.dims()
    dim = call.args["dim"] % len(dims)
    if call.name == "stack":
        wires = [
            call.reshape(w, (*w.dims[:dim], (), *w.dims[dim:]))
            for w in wires  # type: ignore[union-attr, arg-type]
        ]
    return call.add("concat", wires, dims, call.dtype(), dim=dim)  # type: ignore[arg-type]


def _broadcast_tensors(call: Call) -> list[Wire]:
    """Each tensor at the common shape."""
    results = []
    for wire, value in zip(call.tensors(), call.node.meta["val"], strict=True):
        dims = call.builder._dims(value, (wire.dims,))
        results.append(wire if dims == wire.dims else call.add("expand", [wire], dims))
    return results


def _repeat_interleave(call: Call) -> Wire:
    """Each entry of a dim repeated: unsqueeze, expand, reshape."""
    x, times, dim = call.wire("self"), call.args["repeats"], call.args["dim"]
    if not isinstance(times, int) or dim is None:
        return call.opaque()  # type: ignore[return-value]
    dim %= x.rank
    lead, rest = x.dims[: dim + 1], x.dims[dim + 1 :]
    apart = call.reshape(x, (*lead, (), *rest))
    more = call.add("expand", [apart], (*lead, (times,), *rest))
    return call.add("reshape", [more], (*lead[:-1], (*lead[-1], times), *rest))


def _layer_norm(call: Call) -> Wire:
    if len(call.args["normalized_shape"]) != 1:
        return call.opaque()  # type: ignore[return-value]
    x, weight, bias = call.wire("input"), call.optional("weight"), call.optional("bias")
    operands = [x] + ([weight] if weight else []) + ([bias] if bias else [])
    return call.add("layer_norm", operands, x.dims, call.dtype(), eps=call.args["eps"])


def _rms_norm(call: Call) -> Wire:
    x, weight, eps = call.wire("input"), call.optional("weight"), call.args["eps"]
    if len(call.args["normalized_shape"]) != 1 or weight is None:
        return call.opaque()  # type: ignore[return-value]
    return call.add(
        "rms_norm", [x, weight], x.dims, call.dtype(), eps=eps, offset=0.0, wide_weight=False
    )


def _reduce(call: Call) -> Wire:
    """sum and mean, over some dims or all."""
    x, dims = call.wire("self"), call.args.get("dim")
    every = list(range(x.rank)) if not dims and dims != 0 else dims
    gone = sorted(d % x.rank for d in ([every] if isinstance(every, int) else every))
    keepdim = bool(call.args.get("keepdim", False))
    result = call.dims(x)
    if (dtype := call.dtype()) != x.dtype and x.is_float:
        x = call.add("cast", [x], x.dims, dtype, to=dtype)
    return call.add(call.name, [x], result, dtype, dims=gone, keepdim=keepdim)


def _softmax(call: Call) -> Wire:
    """Over the last dim; another dim is brought there and back."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    if (dtype := call.dtype()) != x.dtype:
        x = call.add("cast", [x], x.dims, dtype, to=dtype)
    order = [*(i for i in range(x.rank) if i != dim), dim]
    turned = call.permute(x, order)
    kind = "softmax" if "log" not in call.name else "torch.log_softmax"
    result = call.add(kind, [turned], turned.dims)
    return call.permute(result, [order.index(i) for i in range(x.rank)])


def _softplus(call: Call) -> Wire:
    if call.args["beta"] != 1:
        return call.opaque()  # type: ignore[return-value]
    x = call.wire("self")  # `threshold` only avoids overflow
    return call.add("softplus", [x], x.dims)


def _where(call: Call) -> Wire | list[Wire]:
    """where(mask, x, number) fills x where the mask is False."""
    mask, x = call.optional("condition"), call.optional("self")
    value = call.args.get("other")
    if mask is None or x is None or not isinstance(value, (int, float)):
        return call.opaque()
    return call.add("torch.keep", [x, mask], call.dims(x, mask), call.dtype(), value=value)


_HANDLERS: dict[str, Callable[[Call], Wire | list[Wire]]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rsub"), _binary),
    **dict.fromkeys(("pow", "square"), _power),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(
        ("transpose", "t", "permute", "movedim", "swapaxes", "swapdims", "numpy_T"), _transpose
    ),
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unbind", "tensor_split"), _split),
    **dict.fromkeys(("cat", "stack", "concat"), _cat),
    "broadcast_tensors": _broadcast_tensors,
    "repeat_interleave": _repeat_interleave,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    **dict.fromkeys(("sum", "mean"), _reduce),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), _softmax),
    "softplus": _softplus,
    "where": _where,
}


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
