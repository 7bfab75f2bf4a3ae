"""The batch: what its tensors are, and what integers in it index."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...ir.graph import Graph, Value
from ...ir.plan import Plan
from .body import needed_inputs

Entry = tuple[str, tuple[str | int, ...], int]
"""dtype, dims ("b", "s" or a number) and the bound of integers: the vocabulary they index."""


def batch_entries(plan: Plan) -> dict[str, Entry]:
    """What the batch's tensors are, by name."""
    return {value.name: _entry(plan, value) for value in plan.model.inputs}


def drawn_batch(
    entries: Mapping[str, Entry], samples: int, seq_len: int, dtype: str
) -> dict[str, np.ndarray]:
    """A global batch drawn at random, all of whose labels count. Floats have the given dtype."""
    generator = np.random.default_rng(20)
    made: dict[str, np.ndarray] = {}
    for name, (kind, dims, bound) in entries.items():
        shape = [{"b": samples, "s": seq_len}.get(str(dim), dim) for dim in dims]
        sizes = [int(size) for size in shape]
        if kind == "bool":
            made[name] = generator.random(sizes) < 0.5
        elif "mask" in name:
            made[name] = np.ones(sizes, kind)
        elif kind.startswith("int"):
            made[name] = generator.integers(0, bound, sizes).astype(kind)
        else:
            made[name] = generator.standard_normal(sizes).astype(dtype)
    return made


def _entry(plan: Plan, value: Value) -> Entry:
    dims = tuple(d[0] if d and isinstance(d[0], str) else _number(d) for d in value.dims)
    dtype = {"model": "float32", "wide": "float32"}.get(value.dtype, value.dtype)
    return dtype, dims, _bound(plan, value)


def batch_entry(plan: Plan, value: Value) -> str:
    """An entry as it is written."""
    dtype, dims, bound = _entry(plan, value)
    return f"{(dtype, dims, bound)!r}".replace("'", '"')


def _number(dim: tuple[int | str, ...]) -> int:
    number = 1
    for size in dim:
        assert isinstance(size, int)
        number *= size
    return number


def _bound(plan: Plan, value: Value) -> int:
    """The number of rows of the table that an integer input indexes, or of classes it names."""
    if not value.dtype.startswith("int"):
        return 0
    bounds: list[int] = []
    for segment in plan.model.segments:
        graph = plan.model.blocks[segment.block]
        for op in graph.ops:
            if op.kind in ("embedding", "cross_entropy"):
                dim = graph.values[op.operands[0]].dims[0 if op.kind == "embedding" else -1]
                outer = dict(zip(graph.inputs, segment.inputs, strict=True))
                sources = _sources(plan, outer, graph, op.operands[1])
                if value.name in sources:
                    bounds.append(_number(dim))
    return min(bounds, default=2)


def _sources(plan: Plan, outer: dict[str, str], graph: Graph, value: str) -> set[str]:
    """The batch tensors that a value of a segment is made from."""
    names = {outer[n] for n in needed_inputs(graph, {value})}
    preamble = plan.model.preamble
    return names | needed_inputs(preamble, names & set(preamble.outputs))
