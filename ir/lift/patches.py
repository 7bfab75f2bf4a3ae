"""Convolutions whose windows do not overlap: a linear layer on each patch (a ViT's first layer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..graph import Dims
from .dims import elements
from .draft import Wire


class Adds(Protocol):
    """What both tracers' calls can do: ops and views at the end of the draft."""

    def add(self, kind: str, operands: Any, dims: Dims, /) -> Wire:
        """An op with one result."""

    def reshape(self, wire: Wire, dims: Dims) -> Wire:
        """A reshape to `dims`, or nothing."""

    def permute(self, wire: Wire, order: Any) -> Wire:
        """Dim `order[i]` becomes dim i, or nothing."""


def patches(call: Adds, x: Wire, kernel: Wire, dims: Sequence[tuple[Any, ...]]) -> Wire | None:
    """The product of the patches of x [b, *sizes, c] with a kernel [*window, c, o]: [b, *counts, o]
    with `dims`; None where windows leave a rest of x out."""
    spatial = kernel.rank - 2
    apart: list[tuple[Any, ...]] = [x.dims[0]]
    for whole, window, count in zip(x.dims[1:-1], kernel.dims[:spatial], dims[1:-1], strict=True):
        if elements(whole) != elements(count) * elements(window):
            return None
        apart += [count, window]
    y = call.reshape(x, (*apart, x.dims[-1]))
    order = [0, *range(1, 2 * spatial, 2), *range(2, 2 * spatial + 1, 2), 2 * spatial + 1]
    y = call.permute(y, order)
    flat = tuple(n for dim in kernel.dims[:-1] for n in dim)
    y = call.reshape(y, (*dims[:-1], flat))
    return call.add("linear_io", [y, call.reshape(kernel, (flat, kernel.dims[-1]))], tuple(dims))
