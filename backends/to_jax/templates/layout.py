"""How parameters lie on the mesh, and how they are stored.

A type says how a tensor lies along one axis of the mesh (`MESH` in settings.py, outermost first):

    S(d)    split along dim d (its outermost factor)
    S(d.k)  split along factor k of dim d: the shard is no contiguous range of the dim
    I, R    replicated; the gradient is replicated (I) or a partial sum (R)

An array is *stored* so that a `NamedSharding` says how it lies: where an inner factor is split, the
factors are dims of their own (GPT-2's fused projection of columns (3 n d) is stored as
[h, 3, n, d]), and the layers of a stack are one array with the layer as its first dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


@dataclass(frozen=True)
class Parameter:
    """A logical parameter: `shape` of the whole, `types` per tensor axis, `init` = (kind, value),
    `stages` that hold it, `factors` the factor sizes of each dim."""

    shape: tuple[int, ...]
    types: Mapping[str, str]
    init: tuple[str, float] = ("constant", 0.0)
    stages: tuple[int, ...] = (0,)
    trainable: bool = True
    factors: tuple[tuple[int, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.factors:
            object.__setattr__(self, "factors", tuple((size,) for size in self.shape))


@dataclass(frozen=True)
class Stored:
    """An array of the program: the parameter of `names`, one per layer where it is `stacked`.

    `shape` as stored; `axes` are the axes that split each dim of it, outermost first; `dims` counts
    the stored dims of every dim of the parameter. `shared` is the dim that ZeRO splits along dp as
    well, inside the others (None: no dim divides, or there is no ZeRO).
    """

    names: tuple[str, ...]
    parameter: Parameter
    stacked: bool
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]
    dims: tuple[int, ...]
    shared: int | None = None

    def fold(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one layer's shard with the parameter's own dims, from its stored shape."""
        sizes, folded = list(shape), []
        for count in self.dims:
            folded.append(prod(sizes[:count]))
            sizes = sizes[count:]
        return tuple(folded)

    def split(self, zero: bool) -> tuple[tuple[str, ...], ...]:
        """The axes that split each dim, with dp among them where ZeRO splits the array."""
        if not zero or self.shared is None:
            return self.axes
        return tuple(a + ("dp",) * (i == self.shared) for i, a in enumerate(self.axes))


_INDEX = re.compile(r"\[([\d-]+)\]")


def path_in(module: str, name: str) -> str | None:
    """A parameter's path in a module, or None where it is elsewhere: `wq` of `layers.3.wq` in
    `layers.3`, and of `layers.wq[3]` in `layers[3]`, the slice of an array."""
    if found := _INDEX.search(module):
        index = _INDEX.search(name)
        if index is None or index[1] != found[1]:
            return None
        return _INDEX.sub("", name, count=1).removeprefix(module[: found.start()] + ".")
    return name.removeprefix(f"{module}.") if name.startswith(f"{module}.") else None


def renamed(name: str, module: str, other: str) -> str:
    """What a module's parameter is called in another module, or in a stack of such modules."""
    if found := _INDEX.search(other):
        return _INDEX.sub(found[0], name, count=1)
    return f"{other}.{name.removeprefix(f'{module}.')}"


def split_of(kind: str) -> tuple[int, int] | None:
    """(dim, factor) of a split type, None for R, I and P."""
    if not kind.startswith("S("):
        return None
    dim, _, part = kind[2:-1].partition(".")
    return int(dim), int(part or 0)


def stored(
    names: tuple[str, ...], parameter: Parameter, stacked: bool, mesh: Mapping[str, int], zero: bool
) -> Stored:
    """How the parameter of these names is stored on a mesh; `zero`: split along dp as well."""
    places = {a: split_of(parameter.types.get(a, "I")) for a in mesh if mesh[a] > 1}
    shape: list[int] = [len(names)] if stacked else []
    axes: list[tuple[str, ...]] = [()] if stacked else []
    dims: list[int] = []
    for dim, sizes in enumerate(parameter.factors):
        inner = any(at is not None and at[0] == dim and at[1] > 0 for at in places.values())
        parts = [(part, size) for part, size in enumerate(sizes)]
        if not inner:
            parts = [(0, prod(sizes))]
        dims.append(len(parts))
        for part, size in parts:
            shape.append(size)
            axes.append(tuple(a for a, at in places.items() if at == (dim, part)))
    local = [size // prod(mesh[a] for a in over) for size, over in zip(shape, axes, strict=True)]
    free = [i for i, size in enumerate(local) if size % mesh["dp"] == 0 and (i or not stacked)]
    shared = free[0] if zero and free else None  # parts of the first dim lie together in memory
    return Stored(names, parameter, stacked, tuple(shape), tuple(axes), tuple(dims), shared)
