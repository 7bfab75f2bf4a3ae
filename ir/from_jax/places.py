"""Ranges, lookups and updates at places: slice, gather, scatter and their like.

A function takes a call and returns the wire of its result; None where it has no form for this case.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..lift.dims import elements, same_count
from ..lift.draft import Wire, uncast
from .call import Call
from .evaluate import fixed_value
from .flatten import Source

Made = Wire | None


def slice_(call: Call) -> Made:
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


def dynamic_slice(call: Call) -> Made:
    """A range whose place is known."""
    x, starts = call.wires[0], []
    for source in call.node.operands[1:]:
        number = _numbers(source)
        if number is None:
            return None
        starts += number
    sizes = call.params["slice_sizes"]
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    return _ranges(call, x, starts, stops, (1,) * x.rank)


def gather(call: Call) -> Made:
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
        and same_count(call.dims(), x.dims[:-1])
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


def update(call: Call) -> Made:
    """A range of one dim written anew, at a place that is known: what is before it, the new, and
    what is behind it. The rest of x keeps its gradient."""
    x = call.wires[0]
    if call.name == "dynamic_update_slice":
        new, taken = call.wires[1], [_numbers(each) for each in call.node.operands[2:]]
        if any(each is None for each in taken):
            return None
        begin = [each[0] for each in taken if each]
        dims, index = new.dims, 1
    else:
        numbers, starts = call.params["dimension_numbers"], _numbers(call.node.operands[1])
        if starts is None or call.wires[1].rank != 1 or numbers.operand_batching_dims:
            return None
        at = dict(zip(numbers.scatter_dims_to_operand_dims, starts, strict=True))
        begin = [at.get(d, 0) for d in range(x.rank)]
        window = iter(call.wires[2].dims)
        dims = tuple(() if d in numbers.inserted_window_dims else next(window)
                     for d in range(x.rank))  # fmt: skip
        new, index = call.wires[2], 2
    partial = [d for d in range(x.rank) if dims[d] != x.dims[d]]
    if not partial:
        partial = [x.rank - 1]
    if len(partial) != 1 or any(begin[d] for d in range(x.rank) if d != partial[0]):
        return None
    (dim,), start = partial, begin[partial[0]]
    size, whole = elements(dims[dim]), elements(x.dims[dim])
    if whole < 0 or size < 0:
        return None

    def piece(first: int, last: int) -> list[Wire]:
        if first == last:
            return []
        part = tuple(((last - first,) if last - first > 1 else ()) if d == dim else n
                     for d, n in enumerate(x.dims))  # fmt: skip
        return [call.add("slice", [x], part, dim=dim, start=first, stop=last)]

    old = piece(start, start + size)[0]
    number = call.number(index)
    if call.name == "scatter-add":
        if number is not None:
            made = call.add("shift", [old], dims, call.dtype(), term=number)
        else:
            made = call.add("add", [old, call.reshape(new, dims)], dims, call.dtype())
    elif number is not None:
        zero = call.add("scale", [old], dims, call.dtype(), factor=0)
        made = zero if number == 0 else call.add("shift", [zero], dims, call.dtype(), term=number)
    else:
        made = call.reshape(new, dims)
    parts = [*piece(0, start), made, *piece(start + size, whole)]
    if len(parts) == 1:
        return made
    return call.add("concat", parts, x.dims, call.dtype(), dim=dim)
