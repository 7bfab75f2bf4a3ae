"""Primitives → ops of the draft, where a primitive needs more than another name.

A function takes a call and returns the wire, or wires, of its results; None where it has no form
for this case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..graph import Dims
from ..lift.dims import elements, same_count
from ..lift.draft import Wire, uncast
from .call import Call
from .evaluate import fixed_value
from .flatten import ITERATIONS, SLICE, Node, Source

Made = Wire | list[Wire] | None

UNARY = {
    "tanh": "tanh", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt", "erf": "erf",
    "abs": "abs", "neg": "neg", "logistic": "sigmoid", "erfc": "erfc",
    "log1p": "log1p",
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
        return None
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
        return call.add("relu", [x], dims, dtype) if number == 0 else None
    if name == "pow" and not first:
        return call.add("power", [x], dims, dtype, exponent=number)
    return None


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


def _slice(call: Call) -> Made:
    """Ranges of any number of dims; every second entry of the last."""
    x = call.wires[0]
    starts, stops = call.params["start_indices"], call.params["limit_indices"]
    steps = call.params["strides"] or (1,) * x.rank
    return _ranges(call, x, starts, stops, steps)


def _ranges(call: Call, x: Wire, starts: Any, stops: Any, steps: Any) -> Made:
    target = call.dims_of([_length(a, b, c) for a, b, c in zip(starts, stops, steps, strict=True)])
    for dim, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        if target[dim] == x.dims[dim]:
            continue
        dims = tuple(target[dim] if i == dim else d for i, d in enumerate(x.dims))
        if step == 2 and start in (0, 1) and elements(dims[dim]) * 2 == elements(x.dims[dim]):
            x = call.add("torch.every_second", [x], dims, dim=dim, start=int(start))
        elif step != 1 or not isinstance(start, int | np.integer):
            return None
        else:
            end = int(stop) if str(stop).isdigit() else "".join(map(str, dims[dim]))
            x = call.add("slice", [x], dims, dim=dim, start=int(start), stop=end)
    return x


def _length(start: Any, stop: Any, step: Any) -> Any:
    return stop - start if step == 1 else (stop - start + step - 1) // step


def _dynamic_slice(call: Call) -> Made:
    x, starts = call.wires[0], []
    for source in call.node.operands[1:]:
        number = _numbers(source)
        if number is None:
            return None
        starts += number
    sizes = call.params["slice_sizes"]
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    return _ranges(call, x, starts, stops, (1,) * x.rank)


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


def _select(call: Call) -> Made:
    """where(mask, x, number)."""
    if len(call.wires) != 3:
        return None
    mask, other, x = call.wires  # False picks the first
    value, filled = call.number(1), call.number(2)
    dims = call.dims()
    if (chosen := call.number(0)) is not None:
        return call.broadcast(x if chosen else other, dims)
    if value is not None and not mask.carried:
        x = call.broadcast(x, dims)
        return call.add("torch.keep", [x, mask], dims, call.dtype(), value=value)
    if filled is not None and not mask.carried:
        other = call.broadcast(other, dims)
        return call.add("torch.masked_fill", [other, mask], dims, call.dtype(), value=filled)
    return None


def _gather(call: Call) -> Made:
    """A lookup of rows, a pick along the last dim, or a range."""
    numbers, sizes = call.params["dimension_numbers"], call.params["slice_sizes"]
    x, index = call.wires
    if (table := uncast(x)).role == "parameter" and not numbers.operand_batching_dims:
        rows = _rows(call, table, numbers)
        if rows is None or rows.dtype == x.dtype:
            return rows
        return call.add("cast", [rows], rows.dims, x.dtype, to=x.dtype)
    if (
        tuple(numbers.collapsed_slice_dims) == (x.rank - 1,)
        and tuple(numbers.start_index_map) == (x.rank - 1,)
        and tuple(numbers.operand_batching_dims) == tuple(range(x.rank - 1))
        and not numbers.offset_dims
    ):
        return _pick(call, x, index)
    if not numbers.operand_batching_dims and index.rank == 1:
        starts = _numbers(call.node.operands[1])
        if starts is None:
            return None
        where = dict(zip(numbers.start_index_map, starts, strict=True))
        begin = [where.get(d, 0) for d in range(x.rank)]
        stop = [a + size for a, size in zip(begin, sizes, strict=True)]
        piece = _ranges(call, x, begin, stop, (1,) * x.rank)
        return call.reshape(piece, call.dims()) if isinstance(piece, Wire) else None
    return _regular(call, x, numbers)


def _regular(call: Call, x: Wire, numbers: Any) -> Made:
    """Entries of one dim at equal distances: `x[..., ::2]`."""
    taken, dims = tuple(numbers.collapsed_slice_dims), call.dims()
    entries = _numbers(call.node.operands[1])
    if len(taken) != 1 or tuple(numbers.start_index_map) != taken or not entries:
        return None
    dim = int(taken[0])
    others = tuple(i for i in range(x.rank) if i != dim)
    if tuple(numbers.offset_dims) != others or len(dims) != x.rank or len(entries) < 2:
        return None
    start, step = entries[0], entries[1] - entries[0]
    stop = start + step * len(entries)
    if step < 1 or entries != list(range(start, stop, step)):
        return None
    if any(dims[i] != x.dims[i] for i in others):
        return None
    if step == 1:
        return call.add("slice", [x], dims, dim=dim, start=start, stop=stop)
    if step != 2 or start > 1 or 2 * len(entries) != elements(x.dims[dim]):
        return None
    return call.add("torch.every_second", [x], dims, dim=dim, start=start)


def _rows(call: Call, table: Wire, numbers: Any) -> Wire | None:
    """`table[index]`."""
    dims = call.dims()
    lead = len(dims) - (table.rank - 1)
    if (
        tuple(numbers.collapsed_slice_dims) != (0,)
        or tuple(numbers.start_index_map) != (0,)
        or tuple(numbers.offset_dims) != tuple(range(lead, len(dims)))
        or table.rank != 2
    ):
        return None
    ids = call.wire_of(plain_index(call.node.operands[1]))
    ids = call.reshape(ids, dims[:lead])
    return call.add("embedding", [table, ids], dims, table.dtype)


def _pick(call: Call, x: Wire, index: Wire) -> Made:
    ids = call.wire_of(plain_index(call.node.operands[1]))
    picked = call.add("pick", [x, ids], x.dims[:-1], x.dtype)
    return call.reshape(picked, call.dims())


def plain_index(source: Source) -> Source:
    """An index without what makes negative ones count from the end, and without dims of size 1."""
    while source.node is not None:
        node = source.node
        if node.name == "select_n" and _wraps(node.operands):
            source = node.operands[1]
        elif node.name in ("reshape", "broadcast_in_dim", "squeeze", "convert_element_type") and (
            _same_size(node.operands[0], source)
        ):
            source = node.operands[0]
        elif node.name == "clamp" and len(node.operands) == 3:
            source = node.operands[1]
        else:
            break
    return source


def _same_size(a: Source, b: Source) -> bool:
    if not a.shape and b.shape:
        return False
    return [str(n) for n in a.shape if str(n) != "1"] == [str(n) for n in b.shape if str(n) != "1"]


def _wraps(operands: tuple[Source, ...]) -> bool:
    """select(x < 0, x, x + n)."""
    test, x, moved = operands
    lower = test.node is not None and test.node.name == "lt" and test.node.operands[0] is x
    more = moved.node is not None and moved.node.name == "add" and x in moved.node.operands
    return lower and more


def _numbers(source: Source) -> list[int] | None:
    """The entries of an index, where they are numbers whatever the sizes and inputs."""
    value = fixed_value(source)
    return None if value is None else [int(n) for n in value.reshape(-1)]


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
    apart: list[tuple[Any, ...]] = [x.dims[0]]
    for size, count in zip(window, turned[1:-1], strict=True):
        apart += [count, (size,) if size > 1 else ()]
    if any(elements(d) != elements(n) * size for d, n, size in
           zip(x.dims[1:-1], turned[1:-1], window, strict=True)):  # fmt: skip
        return None
    spatial = len(window)
    y = call.reshape(x, (*apart, x.dims[-1]))
    order = [0, *range(1, 2 * spatial, 2), *range(2, 2 * spatial + 1, 2), 2 * spatial + 1]
    y = call.permute(y, order)
    kernel = call.permute(w, w_order)
    flat = tuple(n for dim in kernel.dims[:-1] for n in dim)
    y = call.reshape(y, (*turned[:-1], flat))
    made = call.add("linear_io", [y, call.reshape(kernel, (flat, kernel.dims[-1]))], turned)
    places = [out_spec[0], *out_spec[2:], out_spec[1]]
    return call.permute(made, [places.index(i) for i in range(len(places))])


HANDLERS: dict[str, Callable[[Call], Made]] = {
    **dict.fromkeys(("add", "add_any", "sub", "mul", "div", "max", "pow"), _binary),
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(("integer_pow", "square"), _power),
    "convert_element_type": _cast,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    **dict.fromkeys(("reduce_sum", "reduce_max"), _reduce),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "concatenate": _concatenate,
    **dict.fromkeys(("stack", ITERATIONS), _stack),
    SLICE: _entry,
    "dot_general": _dot,
    "select_n": _select,
    "gather": _gather,
    "conv_general_dilated": _convolution,
}
