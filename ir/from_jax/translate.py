"""Primitives → ops of the draft, where a primitive needs more than another name.

A function takes a call and returns the wire, or wires, of its results; None where it has no form
for this case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InvalidInput
from ..graph import Dims
from ..lift.dims import elements, same_count
from ..lift.draft import Wire
from ..lift.patches import patches
from .call import Call
from .choices import at_least, select
from .flatten import ITERATIONS, SLICE, Node, Source
from .places import dynamic_slice, gather, slice_, update
from .routing import ragged_dot, top_k

Made = Wire | list[Wire] | None

UNARY = {
    "tanh": "tanh", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "erf": "erf",
    "abs": "abs", "neg": "neg", "logistic": "sigmoid", "erfc": "erfc",
    "log1p": "log1p", "expm1": "expm1",
}  # fmt: skip
"""Primitive → kind, for those of one operand."""

ALIASES = frozenset({"copy", "copy_p", "optimization_barrier", "pvary", "reduce_precision"})
"""Primitives that change nothing we keep track of."""


def _spread(call: Call, wire: Wire, dims: Dims) -> Wire:
    """An operand of a pointwise op without the broadcasting that the op does by itself."""
    while op := wire.made_by("expand", "reshape"):
        inner = op.operands[0]
        if op.kind == "reshape" and wire.dims[-inner.rank :] != inner.dims:
            break
        if op.kind == "reshape" and (any(wire.dims[: wire.rank - inner.rank]) or not inner.rank):
            break
        wire = inner
    return wire


def _binary(call: Call) -> Made:
    """add, sub, mul, div, max, pow: with a tensor or with a number."""
    name = "add" if call.name == "add_any" else call.name
    dims = call.dims()
    left, right = call.number(0), call.number(1)
    if left is not None and right is not None:
        return None
    if left is not None or right is not None:
        number: Any = right if left is None else left
        x = call.wires[0 if left is None else 1]
        if x.dims != dims:
            x = call.broadcast(x, dims)
        return _with_number(call, name, x, number, left is not None)
    x, y = call.wires
    if name == "mul" and x is y:
        return call.add("power", [x], dims, call.dtype(), exponent=2)
    if name not in ("add", "sub", "mul", "div"):
        return None  # the greater of two tensors has no rule
    small = [_spread(call, x, dims), _spread(call, y, dims)]
    if not any(wire.dims == dims for wire in small):
        small[0] = x
    return call.add(name, small, dims, call.dtype())


def _with_number(call: Call, name: str, x: Wire, number: Any, first: bool) -> Made:
    dims, dtype = call.dims(), call.dtype()
    if name in ("add", "sub"):
        if first and name == "sub":
            x = call.add("neg", [x], dims, dtype)
        elif name == "sub":
            number = -number
        return x if number == 0 else call.add("shift", [x], dims, dtype, term=number)
    if name == "mul" or (name == "div" and not first):
        factor = number if name == "mul" else 1 / number
        return x if factor == 1 else call.add("scale", [x], dims, dtype, factor=factor)
    if name == "div":
        inverse = call.add("power", [x], dims, dtype, exponent=-1)
        return inverse if number == 1 else call.add("scale", [inverse], dims, dtype, factor=number)
    if name == "max":
        if number == float("-inf"):
            return x
        return at_least(call, x, number)
    if name == "min":  # the least of x and c: the greatest of -x and -c, negated
        if number == float("inf"):
            return x
        negated = call.add("neg", [x], dims, dtype)
        return call.add("neg", [at_least(call, negated, -number)], dims, dtype)
    if name == "pow" and not first:
        return call.add("power", [x], dims, dtype, exponent=number)
    return None


def _last(call: Call) -> Made:
    """cumsum and sort of one tensor along any dim: brought last, and back."""
    dim = int(call.params["axis" if call.name == "cumsum" else "dimension"])
    if len(call.wires) != 1 or call.params.get("reverse"):
        return None
    (x,) = call.wires
    order = [*(i for i in range(x.rank) if i != dim), dim]
    turned = call.permute(x, order)
    made = call.permute(
        call.add(call.name, [turned], turned.dims), [order.index(i) for i in range(x.rank)]
    )
    return [made] if call.name == "sort" else made


def _unary(call: Call) -> Made:
    return call.add(UNARY[call.name], call.wires, call.dims(), call.dtype())


def _power(call: Call) -> Made:
    exponent = 2 if call.name == "square" else call.params["y"]
    return call.add("power", call.wires, call.dims(), call.dtype(), exponent=exponent)


def _cast(call: Call) -> Made:
    (x,), dtype = call.wires, call.dtype()
    return x if dtype == x.dtype else call.add("cast", [x], x.dims, dtype, to=dtype)


def _reshape(call: Call) -> Made:
    """JAX lets a symbolic batch pass for the number that a reshape names; the graph must not."""
    (x,), dims = call.wires[:1], call.dims()
    if not any(" " in str(n) for d in (*x.dims, *dims) for n in d) and not same_count(x.dims, dims):
        raise InvalidInput(
            f"{call.where}: it makes {list(x.dims)} into {list(dims)}, so it works for one batch "
            "size only; take sizes from x.shape"
        )
    return call.reshape(x, dims)


def _broadcast(call: Call) -> Made:
    """Dims of size 1 put in, and repeated."""
    (x,), dims = call.wires[:1], call.dims()
    places = [int(d) for d in call.params["broadcast_dimensions"]]
    apart = tuple(x.dims[places.index(i)] if i in places else () for i in range(len(dims)))
    spread = call.reshape(x, apart)
    if spread.source is None:
        shape = call.node.params["shape"]
        kept = tuple(size if i in places and x.dims[places.index(i)] else 1
                     for i, size in enumerate(shape))  # fmt: skip
        node = Node(
            call.name, call.node.primitive, {**call.params, "shape": kept}, call.node.operands, (),
            call.node.scope, call.node.info,
        )  # fmt: skip
        spread.source = Source(kept, call.node.results[0].dtype, node=node)
        node.results = (spread.source,)
    return call.broadcast(spread, dims)


def _transpose(call: Call) -> Made:
    return call.permute(call.wires[0], call.params["permutation"])


def _reduce(call: Call) -> Made:
    kind = {"reduce_sum": "sum", "reduce_max": "reduce_max"}[call.name]
    gone = sorted(int(d) for d in call.params["axes"])
    return call.add(kind, call.wires, call.dims(), call.dtype(), dims=gone, keepdim=False)


def _split(call: Call) -> Made:
    """Equal pieces are a chunk, others are slices."""
    (x,), dim = call.wires, int(call.params["axis"])
    sizes = [int(n) if str(n).isdigit() else n for n in call.params["sizes"]]
    every = [call.dims(i) for i in range(len(sizes))]
    if len(sizes) == 1:
        return [x]
    if all(dims == every[0] for dims in every):
        return call.draft.add(
            "chunk", [x], every, count=len(every), module=call.module,
            attributes={"dim": dim, "count": len(every)},
        ).results  # fmt: skip
    pieces, start = [], 0
    for size, dims in zip(sizes, every, strict=True):
        if not isinstance(size, int):
            return None
        pieces.append(call.add("slice", [x], dims, dim=dim, start=start, stop=start + size))
        start += size
    return pieces


def _concatenate(call: Call) -> Made:
    return call.add(
        "concat", call.wires, call.dims(), call.dtype(), dim=int(call.params["dimension"])
    )


def _stack(call: Call) -> Made:
    axis = int(call.params.get("axis", 0))
    wires = [call.reshape(w, (*w.dims[:axis], (), *w.dims[axis:])) for w in call.wires]
    return call.add("concat", wires, call.dims(), call.dtype(), dim=axis)


def _entry(call: Call) -> Made:
    """One entry of dim 0 of what is no parameter."""
    x, index = call.wires[0], call.params["index"]
    piece = call.add("slice", [x], ((), *x.dims[1:]), dim=0, start=index, stop=index + 1)
    return call.reshape(piece, x.dims[1:])


def _dot(call: Call) -> Made:
    """A product of tensors; it stays whole until attention is found."""
    (summed_x, summed_w), (both_x, both_w) = call.params["dimension_numbers"]
    x, w = call.wires
    left = list(range(x.rank))
    right = [-1] * w.rank
    for a, b in zip((*both_x, *summed_x), (*both_w, *summed_w), strict=True):
        right[int(b)] = int(a)
    fresh = iter(range(x.rank, x.rank + w.rank))
    right = [next(fresh) if label < 0 else label for label in right]
    lead = [int(d) for d in both_x]
    rows = [i for i in left if i not in lead and i not in [int(d) for d in summed_x]]
    out = [*lead, *rows, *(label for label in right if label >= x.rank)]
    dims = call.dims()
    product = call.add("einsum", [x, w], dims, call.dtype(), left=left, right=right, out=out)
    return product


def _convolution(call: Call) -> Made:
    """One whose windows do not overlap: patches, and a linear layer on each."""
    numbers, strides = call.params["dimension_numbers"], call.params["window_strides"]
    x, w = call.wires
    x = call.permute(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    w_order = (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    window = [elements(w.dims[d]) for d in numbers.rhs_spec[2:]]
    plain = (
        all(tuple(map(int, pads)) == (0, 0) for pads in call.params["padding"])
        and list(map(int, strides)) == [max(1, n) for n in window]
        and call.params["feature_group_count"] == 1 == call.params["batch_group_count"]
        and all(n == 1 for n in (*call.params["lhs_dilation"], *call.params["rhs_dilation"]))
    )
    if not plain or w.role != "parameter":
        return None
    out_spec = numbers.out_spec
    turned = tuple(call.dims()[d] for d in (out_spec[0], *out_spec[2:], out_spec[1]))
    made = patches(call, x, call.permute(w, w_order), turned)
    if made is None:
        return None
    places = [out_spec[0], *out_spec[2:], out_spec[1]]
    return call.permute(made, [places.index(i) for i in range(len(places))])


HANDLERS: dict[str, Callable[[Call], Made]] = {
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div", "max", "min", "pow"), _binary),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(("integer_pow", "square"), _power),
    "convert_element_type": _cast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **dict.fromkeys(("reduce_sum", "reduce_max"), _reduce),
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "split": _split,
    "concatenate": _concatenate,
    **dict.fromkeys(("stack", ITERATIONS), _stack),
    SLICE: _entry,
    "dot_general": _dot,
    "select_n": select,
    **dict.fromkeys(("cumsum", "sort"), _last),
    **dict.fromkeys(("dynamic_update_slice", "scatter", "scatter-add"), update),
    "gather": gather,
    "conv_general_dilated": _convolution,
    "top_k": top_k,
    **dict.fromkeys(("ragged_dot_general", "ragged_dot"), ragged_dot),
}
