"""The device mesh: named axes, and the sub-axes they factor into."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Axis:
    """A mesh (sub-)axis. `parent` is the axis it was factored from (`tp` for `tp0`), or itself."""

    name: str
    size: int
    parent: str = ""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidInput(f"mesh axis {self.name!r}: size {self.size}, expected at least 1")
        if not self.parent:
            object.__setattr__(self, "parent", self.name)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Axes from the outermost (largest rank stride) to the innermost (neighbouring ranks).

    Example: `Mesh.of(pp=2, dp=4, tp=8)` has 64 ranks; the ranks of one `tp` group are neighbours.
    """

    axes: tuple[Axis, ...]

    @staticmethod
    def of(**sizes: int) -> Mesh:
        """A mesh of plain axes, outermost first."""
        return Mesh(tuple(Axis(name, size) for name, size in sizes.items()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return prod(axis.size for axis in self.axes)

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise InvalidInput(f"mesh axis {name!r}: this mesh has {', '.join(self.names)}")

    def stride(self, name: str) -> int:
        """Distance in ranks between neighbours along the axis."""
        position = self.axes.index(self[name])
        return prod(axis.size for axis in self.axes[position + 1 :])

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinate of a rank along each axis."""
        return {a.name: rank // self.stride(a.name) % a.size for a in self.axes}

    def factored(self, name: str, sizes: tuple[int, ...]) -> Mesh:
        """This mesh with one axis replaced by sub-axes `name0, name1, …`, outermost first.

        With one size the axis is left as it is. Raises InvalidInput if the sizes do not multiply
        to the axis.
        """
        axis = self[name]
        if prod(sizes) != axis.size:
            raise InvalidInput(f"mesh axis {name!r} of size {axis.size} cannot factor into {sizes}")
        if len(sizes) == 1:
            return self
        parts = tuple(Axis(f"{name}{i}", size, axis.parent) for i, size in enumerate(sizes))
        position = self.axes.index(axis)
        return Mesh(self.axes[:position] + parts + self.axes[position + 1 :])
