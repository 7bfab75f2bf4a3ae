"""Groups of ranks, and which levels of a cluster they cross.

A group is `size` ranks at distance `stride`; ranks are laid out node by node, so which levels of
the cluster it crosses, and with how many members per node, follows from those two numbers. All
groups of a mesh axis run at once; levels give bandwidth per device, so each group is costed with
its own devices' shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

from ..ir.errors import InvalidInput
from .cluster import Cluster, Level
from .torus import Span, exchange_s_per_byte


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks `r, r + stride, …`, `size` of them; a mesh axis of that size and stride.

    For `send` it is a chain, each rank sending to the next. Raises InvalidInput below 1.
    """

    size: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise InvalidInput(f"group of {self.size} ranks at stride {self.stride}: expected >= 1")


@dataclass(frozen=True, slots=True)
class Hop:
    """A level that a group crosses, the cluster's `index`-th: `units` of the level inside it meet
    here, each with `members` ranks of the group; `bytes_per_s` is what one rank sends on it.
    On a torus `spans` are the dims that the group crosses.
    """

    index: int
    level: Level
    units: int
    members: int
    bytes_per_s: float
    spans: tuple[Span, ...] = ()

    @staticmethod
    def over(index: int, level: Level, units: int, members: int) -> Hop:
        """A hop at the level's large-message rate, all of the level's devices sending at once."""
        rate = level.reached_bytes_per_s(units - 1)
        if level.fabric is not None:
            rate *= level.fabric.bandwidth_fraction
        return Hop(index, level, units, members, rate)

    @staticmethod
    def across(index: int, level: Level, units: int, stride: int) -> Hop:
        """The hop of `units` ranks at a stride over a level that may be a torus."""
        if level.torus is None:
            return Hop.over(index, level, units, 1)
        return Hop.along(index, level, level.torus.spans(level.span_devices, units, stride))

    @staticmethod
    def along(index: int, level: Level, spans: tuple[Span, ...]) -> Hop:
        """A hop over those dims of a torus, all of their links sending at once."""
        rate = sum(span.links for span in spans) * level.reached_bytes_per_s(1)
        return Hop(index, level, prod(span.members for span in spans), 1, rate, spans)

    @property
    def steps(self) -> int:
        """Steps of an exchange between the units: ⌈log2 units⌉, on a torus links one by one."""
        if self.spans:
            return sum(span.hops for span in self.spans)
        return (self.units - 1).bit_length()

    def exchange_s_per_byte(self, size: int) -> float:
        """Of an all-to-all over a group of `size`, the part that meets here; per byte of it all."""
        if self.spans:
            return exchange_s_per_byte(self.spans, size, self.level.reached_bytes_per_s(1))
        return self.members * (self.units - 1) / size**2 / self.bytes_per_s


def hops(cluster: Cluster, group: Group) -> tuple[Hop, ...]:
    """The levels a group crosses, innermost first; none for a group of one.

    The worst of the axis's groups counts: where groups do not fill units evenly, some straddle a
    boundary, and where islands or nodes differ, some lie on the slowest. Raises InvalidInput if
    the group does not fit into the cluster.
    """
    if (group.size - 1) * group.stride >= cluster.world_size:
        raise InvalidInput(
            f"group of {group.size} ranks at stride {group.stride} does not fit into "
            f"{cluster.world_size} devices"
        )
    found: list[Hop] = []
    inside = 1
    for index, level in enumerate(cluster.worst_levels):
        members = _members(level, group, cluster.world_size)
        if members > inside:
            units = members // inside
            found.append(
                Hop.across(index, level, units, group.stride)
                if inside == 1
                else Hop.over(index, level, units, inside)
            )
            inside = members
        if inside == group.size:
            break
    return tuple(found)


def shape_of(path: tuple[Hop, ...]) -> tuple[int, ...]:
    """Units per level of the cluster, innermost first, as a `Curve` has them."""
    units = {hop.index: hop.units for hop in path}
    return tuple(units.get(i, 1) for i in range(path[-1].index + 1))


def pair_at(hop: Hop) -> Hop:
    """One device and another at the level of a hop; on a torus the next of the group."""
    if hop.spans:
        step = max(span.step for span in hop.spans)
        return Hop.along(hop.index, hop.level, (Span(2, step, False),))
    return Hop.over(hop.index, hop.level, 2, 1)


def path_of(cluster: Cluster, shape: tuple[int, ...]) -> tuple[Hop, ...]:
    """The hops of a group of that shape, as a curve of the cluster has it."""
    path: list[Hop] = []
    inside = 1
    for index, units in enumerate(shape):
        if units > 1:
            level = cluster.worst_levels[index]
            path.append(
                Hop.across(index, level, units, 1)
                if inside == 1
                else Hop.over(index, level, units, inside)
            )
            inside *= units
    return tuple(path)


def _members(level: Level, group: Group, world_size: int) -> int:
    """How many ranks of a group share one unit of a level (all of them: the group is inside)."""
    span = level.span_devices
    if span == world_size or span % (group.size * group.stride) == 0:
        return group.size
    if span % group.stride:
        return 1
    return gcd(span // group.stride, group.size)
