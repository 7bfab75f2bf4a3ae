"""What a program is emitted for: the mesh without its trivial axes, and sizes of local shards."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ...ir.errors import InvalidInput
from ...ir.graph import Value
from ...ir.mesh import Mesh
from ...ir.rule import Size
from ...ir.types import NdType

LiveType = NdType
"""A type on the axes of size larger than 1 only: on the others there is nothing to convert."""


@dataclass(frozen=True, slots=True)
class LocalSize:
    """The size of a factor of a local shard: `number`, or `symbol · times / by`."""

    number: int = 0
    symbol: str = ""
    times: int = 1
    by: int = 1

    def text(self, symbols: dict[str, str]) -> str:
        """As Python, with the names that stand for the symbols."""
        if not self.symbol:
            return str(self.number)
        text = symbols[self.symbol]
        if self.times > 1:
            text = f"{text} * {self.times}"
        return f"{text} // {self.by}" if self.by > 1 else text


@dataclass(frozen=True, slots=True)
class Target:
    """The mesh of a program. `reduces_low` says that gradients may be bfloat16."""

    mesh: Mesh
    reduces_low: bool = False

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that types name and that have more than one rank, outermost first."""
        return tuple(a.name for a in self.mesh.axes if a.size > 1 and a.name != "pp")

    def size(self, axis: str) -> int:
        """Number of ranks along an axis."""
        return self.mesh[axis].size

    def live(self, types: NdType) -> LiveType:
        """A type without the axes of size 1."""
        axes = self.axes
        return NdType(tuple((a, kind) for a, kind in types if a in axes))

    def local(self, value: Value, types: NdType) -> tuple[tuple[LocalSize, ...], ...]:
        """Sizes of the factors of every dim of a shard.

        The symbol `b` stands for the microbatch of one data-parallel rank, so that a split along
        `dp` leaves it as it is. Raises InvalidInput where a size does not divide.
        """
        return tuple(
            tuple(self._factor(value, types, dim, part, size) for part, size in enumerate(sizes))
            for dim, sizes in enumerate(value.dims)
        )

    def _factor(self, value: Value, types: NdType, dim: int, part: int, size: Size) -> LocalSize:
        axes = [a for a in types.splitting(dim, part) if self.mesh[a].size > 1]
        pieces = prod(self.size(a) for a in axes)
        if isinstance(size, int):
            if size % pieces:
                raise InvalidInput(
                    f"{value.name}: factor {part} of dim {dim} has size {size}, which "
                    f"{' × '.join(axes)} = {pieces} ranks cannot split evenly"
                )
            return LocalSize(number=size // pieces)
        times = 1
        if size == "b" and "dp" in self.axes:
            times = self.size("dp")
            if "dp" in axes:
                times, pieces = 1, pieces // self.size("dp")
        return LocalSize(symbol=size, times=times, by=pieces)

    def local_shape(self, value: Value, types: NdType) -> tuple[int, ...]:
        """The shape of a shard of a value without symbols, such as a parameter."""
        return tuple(prod(size.number for size in dim) for dim in self.local(value, types))


def order_within(types: NdType, dim: int) -> tuple[str, ...]:
    """The axes that split a dim, the outermost first: by factor, then by nesting."""
    axes = types.splitting(dim)
    return tuple(sorted(axes, key=lambda a: (types[a].part, axes.index(a))))


def shown(types: NdType) -> str:
    """`dp: S(0), tp: S(1)`, as comments say it."""
    return ", ".join(f"{axis}: {kind}" for axis, kind in types)
