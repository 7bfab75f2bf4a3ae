"""Operations that need more than renaming: views, biases, reductions, splits.

A function takes a call and returns the wire, or wires, of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lift.dims import elements
from ..lift.draft import Wire
from ..lift.patches import patches
from ..rule import Size
from .call import Call

Made = Wire | list[Wire]


def _binary(call: Call) -> Made:
    """add, sub, mul, div and rsub: with a tensor or with a number."""
    x, number = call.wire("self"), call.number("other")
    alpha = call.args.get("alpha", 1)
    if call.name == "div" and call.args.get("rounding_mode"):
        return call.opaque()
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


def _power(call: Call) -> Made:
    if call.name == "square":
        exponent: Any = 2
    else:
        exponent = call.args["exponent"]
    if not isinstance(exponent, (int, float)):
        return call.opaque()
    x = call.wire("self")
    return call.add("power", [x], x.dims, exponent=exponent)


def _linear(call: Call) -> Made:
    x, bias = call.wire("input"), call.optional("bias")
    y = call.add("linear", [x, call.wire("weight")], call.dims(x))
    return y if bias is None else call.add("add", [y, bias], y.dims)


def _convolution(call: Call) -> Made:
    """One whose windows do not overlap: patches, and a linear layer on each."""
    x, w, bias = call.wire("input"), call.wire("weight"), call.optional("bias")
    window = [elements(dim) for dim in w.dims[2:]]
    spatial = len(window)

    def each(name: str) -> list[Any]:
        value = call.args[name]
        return list(value) * (spatial if len(value) == 1 else 1) if _many(value) else [value]

    plain = (
        w.role == "parameter"
        and x.rank == w.rank
        and each("stride") == window
        and (call.args["padding"] == "valid" or not any(each("padding")))
        and all(n == 1 for n in each("dilation"))
        and call.args["groups"] == 1
    )
    if not plain:
        return call.opaque()
    dims, last = call.dims(x, w), [0, *range(2, w.rank), 1]
    kernel = call.permute(w, [*range(2, w.rank), 1, 0])
    made = patches(call, call.permute(x, last), kernel, tuple(dims[d] for d in last))
    if made is None:
        return call.opaque()
    made = call.permute(made, [last.index(i) for i in range(w.rank)])
    if bias is None:
        return made
    return call.add("add", [made, call.reshape(bias, (bias.dims[0], *[()] * spatial))], dims)


def _many(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _addmm(call: Call) -> Made:
    if call.args["beta"] != 1 or call.args["alpha"] != 1:
        return call.opaque()
    x, w, bias = call.wire("mat1"), call.wire("mat2"), call.wire("self")
    kind = "linear_io" if w.role == "parameter" else "matmul"
    y = call.add(kind, [x, w], call.dims(x))
    return call.add("add", [y, bias], y.dims)


def _matmul(call: Call) -> Made:
    """A product with a parameter is a linear layer."""
    x, w = call.wire("self"), call.wire("other" if "other" in call.args else "mat2")
    if w.rank == 2 and x.rank >= 2:
        if w.role == "parameter":
            return call.add("linear_io", [x, w], call.dims(x))
        turned = w.made_by("permute")
        if turned and turned.operands[0].role == "parameter":
            return call.add("linear", [x, turned.operands[0]], call.dims(x))
    if x.rank < 2 or w.rank < 2:
        return call.opaque()
    return call.add("matmul", [x, w], call.dims(x, w), call.dtype())


def _transpose(call: Call) -> Made:
    x = call.tensors()[0]
    order = list(range(x.rank))
    if call.name in ("t", "numpy_T"):
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


def _slice(call: Call) -> Made:
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    dims = call.dims(x)
    if dims == x.dims:
        return x
    start, stop, step = call.args["start"] or 0, call.args["end"], call.args["step"]
    if step == 2 and start in (0, 1) and elements(dims[dim]) * 2 == elements(x.dims[dim]):
        return call.add("torch.every_second", [x], dims, dim=dim, start=start)
    if step != 1 or not isinstance(start, int):
        return call.opaque()
    whole, part = elements(x.dims[dim]), elements(dims[dim])
    if whole >= 0 and part >= 0:
        start = max(0, start + whole) if start < 0 else start
        stop = start + part
    elif isinstance(stop, int) and stop > 2**62:
        stop = -1
    else:
        stop = "".join(map(str, dims[dim]))
    return call.add("slice", [x], dims, dim=dim, start=start, stop=stop)


def _select(call: Call) -> Made:
    """One index of a dim: a slice of length 1 without its dim."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    index = call.args["index"]
    size = elements(x.dims[dim])
    if not isinstance(index, int) or size < 0:
        return call.opaque()
    index %= size
    dims = tuple(() if i == dim else d for i, d in enumerate(x.dims))
    piece = call.add("slice", [x], dims, dim=dim, start=index, stop=index + 1)
    return call.reshape(piece, tuple(d for i, d in enumerate(x.dims) if i != dim))


def _split(call: Call) -> Made:
    """chunk, split, unbind: equal pieces are a chunk, unequal ones are slices."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    values = call.node.meta["val"]
    every = [call.dims_of(value, x) for value in values]
    draft = call.draft
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
        if elements(dims[dim]) < 0:
            return call.opaque()
        stop = start + elements(dims[dim])
        pieces.append(call.add("slice", [x], dims, dim=dim, start=start, stop=stop))
        start = stop
    return pieces


def _cat(call: Call) -> Made:
    """cat and stack."""
    wires = [wire for node in call.args["tensors"] if isinstance(wire := call.wires[node], Wire)]
    wires = [wire for wire in wires if (0,) not in wire.dims]
    if len(wires) == 1 and call.name != "stack":
        return wires[0]
    dims = call.dims()
    dim = call.args["dim"] % len(dims)
    if call.name == "stack":
        wires = [call.reshape(w, (*w.dims[:dim], (), *w.dims[dim:])) for w in wires]
    return call.add("concat", wires, dims, call.dtype(), dim=dim)


def _broadcast_tensors(call: Call) -> Made:
    """Each tensor at the common shape."""
    results = []
    for wire, value in zip(call.tensors(), call.node.meta["val"], strict=True):
        dims = call.dims_of(value, wire)
        results.append(wire if dims == wire.dims else call.add("expand", [wire], dims))
    return results


def _repeat_interleave(call: Call) -> Made:
    """Each entry of a dim repeated: unsqueeze, expand, reshape."""
    x, times, dim = call.wire("self"), call.args["repeats"], call.args["dim"]
    if not isinstance(times, int) or dim is None:
        return call.opaque()
    dim %= x.rank
    lead, rest = x.dims[: dim + 1], x.dims[dim + 1 :]
    apart = call.reshape(x, (*lead, (), *rest))
    more = call.add("expand", [apart], (*lead, (times,), *rest))
    return call.add("reshape", [more], (*lead[:-1], (*lead[-1], times), *rest))


def _layer_norm(call: Call) -> Made:
    if len(call.args["normalized_shape"]) != 1:
        return call.opaque()
    x, weight, bias = call.wire("input"), call.optional("weight"), call.optional("bias")
    operands = [x] + ([weight] if weight else []) + ([bias] if bias else [])
    return call.add("layer_norm", operands, x.dims, call.dtype(), eps=call.args["eps"])


def _rms_norm(call: Call) -> Made:
    x, weight, eps = call.wire("input"), call.optional("weight"), call.args["eps"]
    if len(call.args["normalized_shape"]) != 1 or weight is None:
        return call.opaque()
    return call.add(
        "rms_norm", [x, weight], x.dims, call.dtype(), eps=eps, offset=0.0, wide_weight=False
    )


def _reduce(call: Call) -> Made:
    """sum and mean, over some dims or all."""
    x, dims = call.wire("self"), call.args.get("dim")
    every = list(range(x.rank)) if not dims and dims != 0 else dims
    gone = sorted(d % x.rank for d in ([every] if isinstance(every, int) else every))
    keepdim = bool(call.args.get("keepdim", False))
    result = call.dims(x)
    if (dtype := call.dtype()) != x.dtype and x.is_float:
        x = call.add("cast", [x], x.dims, dtype, to=dtype)
    return call.add(call.name, [x], result, dtype, dims=gone, keepdim=keepdim)


def _softmax(call: Call) -> Made:
    """Over the last dim; another dim is brought there and back."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    if (dtype := call.dtype()) != x.dtype:
        x = call.add("cast", [x], x.dims, dtype, to=dtype)
    order = [*(i for i in range(x.rank) if i != dim), dim]
    turned = call.permute(x, order)
    kind = "softmax" if "log" not in call.name else "torch.log_softmax"
    result = call.add(kind, [turned], turned.dims)
    return call.permute(result, [order.index(i) for i in range(x.rank)])


def _last(call: Call) -> Made:
    """cumsum and sort along any dim: brought last, and back."""
    x, dim = call.wire("self"), call.args["dim"] % call.wire("self").rank
    if call.args.get("descending"):
        return call.opaque()
    order = [*(i for i in range(x.rank) if i != dim), dim]
    made = call.add(call.name, [call.permute(x, order)], tuple(x.dims[d] for d in order))
    return call.permute(made, [order.index(i) for i in range(x.rank)])


def _leaky_relu(call: Call) -> Made:
    x = call.wire("self")
    return call.add("leaky_relu", [x], x.dims, slope=call.args["negative_slope"])


_SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)
"""Scale and alpha (Klambauer et al., arXiv:1706.02515, equation 14)."""


def _elu(call: Call) -> Made:
    """elu, and what is one with factors: celu is alpha * elu(x / alpha), selu a scaled elu."""
    x = call.wire("self")
    inner, outer, alpha = 1.0, 1.0, 1.0
    if call.name == "selu":
        outer, alpha = _SELU
    elif call.name == "celu":
        outer = float(call.args["alpha"])
        inner = 1 / outer
    else:
        inner, outer, alpha = (float(call.args[n]) for n in ("input_scale", "scale", "alpha"))
    if inner != 1:
        x = call.add("scale", [x], x.dims, factor=inner)
    x = call.add("elu", [x], x.dims, alpha=alpha)
    return x if outer == 1 else call.add("scale", [x], x.dims, factor=outer)


def _softplus(call: Call) -> Made:
    if call.args["beta"] != 1:
        return call.opaque()
    x = call.wire("self")  # `threshold` only avoids overflow
    return call.add("softplus", [x], x.dims)


def _einsum(call: Call) -> Made:
    """Two operands without traces: permutes, reshapes, and a linear layer or a matrix product."""
    text = str(call.args["equation"]).replace(" ", "")
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    wires = [wire for node in call.args["tensors"] if isinstance(wire := call.wires[node], Wire)]
    if len(terms) != 2 or len(wires) != 2 or not arrow or "." in text:
        return call.opaque()
    x, w = wires
    a, b = terms
    if any(len(set(term)) < len(term) for term in (a, b, out)) or not set(a) ^ set(b) <= set(out):
        return call.opaque()  # a trace, or an index that is summed in one operand alone
    if not set(a) & set(b) - set(out):
        return call.opaque()  # no product of matrices
    size = dict(zip(a, x.dims, strict=True)) | dict(zip(b, w.dims, strict=True))
    both = [i for i in a if i in b and i in out]
    summed = [i for i in a if i in b and i not in out]
    rows, columns = [i for i in a if i not in b], [i for i in b if i not in a]

    def merged(names: list[str]) -> tuple[Size, ...]:
        return tuple(n for i in names for n in size[i])

    def shaped(wire: Wire, term: str, order: list[str], dims: list[tuple[Size, ...]]) -> Wire:
        turned = call.permute(wire, [term.index(i) for i in order])
        return call.reshape(turned, tuple(dims))

    lead = [size[i] for i in both]
    y = shaped(w, b, both + summed + columns, [*lead, merged(summed), merged(columns)])
    if not both and w.role == "parameter":
        keep = [size[i] for i in rows]
        z = shaped(x, a, rows + summed, [*keep, merged(summed)])
        product = call.add("linear_io", [z, y], (*keep, merged(columns)))
    else:
        z = shaped(x, a, both + rows + summed, [*lead, merged(rows), merged(summed)])
        product = call.add("matmul", [z, y], (*lead, merged(rows), merged(columns)))
    order = both + rows + columns
    apart = call.reshape(product, tuple(size[i] for i in order))
    return call.permute(apart, [order.index(i) for i in out])


def _detach(call: Call) -> Made:
    """Nothing, for what has no gradient."""
    x = call.tensors()[0]
    if not x.carried:
        return x
    made = call.add("stop_gradient", [x], x.dims)
    made.grad = False
    return made


def _where(call: Call) -> Made:
    """where(mask, x, number) fills x where the mask is False."""
    mask, x, other = call.optional("condition"), call.optional("self"), call.optional("other")
    value = call.args.get("other")
    if mask is None or x is None:
        return call.opaque()
    if other is not None and other.rank == 0 and not other.carried:
        return call.add("torch.keep", [x, mask, other], call.dims(x, mask), call.dtype())
    if not isinstance(value, (int, float)):
        return call.opaque()
    return call.add("torch.keep", [x, mask], call.dims(x, mask), call.dtype(), value=value)


HANDLERS: dict[str, Callable[[Call], Made]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rsub"), _binary),
    **dict.fromkeys(("pow", "square"), _power),
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
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
    "cumsum": _last,
    "leaky_relu": _leaky_relu,
    **dict.fromkeys(("elu", "celu", "selu"), _elu),
    "detach": _detach,
    "einsum": _einsum,
    "where": _where,
}
