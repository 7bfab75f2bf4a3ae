"""What a collective takes over a regular group of ranks: α–β of the best of three algorithms.

A group is `size` ranks at distance `stride`; ranks are laid out node by node, so which levels of
the cluster it crosses, and with how many members per node, follows from those two numbers. All
groups of a mesh axis run at once; levels give bandwidth per device, so each group is costed with
its own devices' shares.

`N` is the full logical tensor in bytes, `n` the group's size, `n_l` how many units of the level
inside it one unit of level `l` has of the group, α_l its step latency, B the bus bandwidth of a
ring through all levels:

    ring          (n-1)/n · N/B and n-1 steps; rings of one node's members leave it through all
                  their NICs at once (NCCL's channels)
    hierarchical  level by level, recursive halving: Σ_l (n_l-1)/n_l · N_l/b_l, ⌈log2 n_l⌉ steps,
                  N_l = what is left of N inside the level
    tree          N/B pipelined, Σ_l ⌈log2 n_l⌉ steps (all-reduce, broadcast)

An all-reduce is a reduce-scatter and an all-gather. Sources: Thakur, Rabenseifner, Gropp (2005)
for the terms; Sanders, Speck, Träff (2009) for the two-tree bandwidth. A guess where nothing has
been measured; measured curves come with a later version.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal

from ..ir.errors import InvalidInput
from .cluster import Cluster, Level

CollectiveKind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"
]


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
    """A level that a group crosses: `units` of the level inside it meet here, each with `members`
    ranks of the group; `bytes_per_s` is what one rank sends on it."""

    level: Level
    units: int
    members: int
    bytes_per_s: float

    @property
    def steps(self) -> int:
        """Steps of a binary exchange between the units: ⌈log2 units⌉."""
        return (self.units - 1).bit_length()


def hops(cluster: Cluster, group: Group) -> tuple[Hop, ...]:
    """The levels a group crosses, innermost first; none for a group of one.

    The worst of the axis's groups counts: where groups do not fill units evenly, some straddle a
    boundary. Raises InvalidInput if the group does not fit into the cluster.
    """
    if (group.size - 1) * group.stride >= cluster.world_size:
        raise InvalidInput(
            f"group of {group.size} ranks at stride {group.stride} does not fit into "
            f"{cluster.world_size} devices"
        )
    found: list[Hop] = []
    inside = 1
    for level in cluster.levels:
        members = _members(level, group, cluster.world_size)
        if members > inside:
            units = members // inside
            rate = level.reached_bytes_per_s(units - 1)
            found.append(Hop(level, units, inside, rate))
            inside = members
        if inside == group.size:
            break
    return tuple(found)


def collective_seconds(cluster: Cluster, kind: CollectiveKind, bytes: float, group: Group) -> float:
    """Seconds of one collective over a group, all groups of the axis at once.

    `bytes` is the full logical tensor within the group: the all-gather's output, the
    reduce-scatter's input, the all-reduce's and broadcast's tensor, the all-to-all's total over
    the group (each rank holds bytes / size); for `send` the message. A group of one and an empty
    tensor cost nothing. Raises InvalidInput for a negative size, an unknown kind, or a group that
    does not fit.
    """
    if bytes < 0:
        raise InvalidInput(f"{kind} of {bytes} bytes: expected at least 0")
    path = hops(cluster, group)
    if not path or bytes == 0:
        return 0.0
    match kind:
        case "all_gather" | "reduce_scatter":
            return min(ring_seconds(path, bytes), hierarchical_seconds(path, bytes))
        case "all_reduce":
            halves = min(ring_seconds(path, bytes), hierarchical_seconds(path, bytes))
            return 2 * min(halves, tree_seconds(path, bytes))
        case "broadcast":
            return tree_seconds(path, bytes)
        case "all_to_all":
            return _all_to_all_seconds(path, bytes, group.size)
        case "send":
            slowest = path[-1]
            return slowest.level.latency_s + bytes / slowest.level.reached_bytes_per_s(1)
        case _:
            raise InvalidInput(f"unknown collective {kind!r}")


def ring_seconds(path: tuple[Hop, ...], bytes: float) -> float:
    """A reduce-scatter or all-gather by rings through all levels."""
    size = _size(path)
    # Of the n hops of a closed ring, those of the outermost level and one less than all units
    # inside it are on every longest path of n-1 hops.
    latency = -path[0].level.latency_s
    for outer, hop in enumerate(path):
        entered = size // hop.members
        within = entered if outer == len(path) - 1 else entered - entered // hop.units
        latency += within * hop.level.latency_s
    return latency + (size - 1) / size * bytes / _bus_bytes_per_s(path)


def hierarchical_seconds(path: tuple[Hop, ...], bytes: float) -> float:
    """A reduce-scatter or all-gather level by level, each on what the level inside left."""
    seconds = 0.0
    for hop in path:
        part = (hop.units - 1) / hop.units * bytes / hop.members
        seconds += hop.steps * hop.level.latency_s + part / hop.bytes_per_s
    return seconds


def tree_seconds(path: tuple[Hop, ...], bytes: float) -> float:
    """A broadcast or a reduction down a pipelined pair of trees."""
    steps = sum(hop.steps * hop.level.latency_s for hop in path)
    return steps + bytes / _bus_bytes_per_s(path)


def _all_to_all_seconds(path: tuple[Hop, ...], bytes: float, size: int) -> float:
    """Direct exchange: each rank sends bytes/size² to every other, over the level where they meet.

    Levels one after the other (safe side); messages of one level in flight together.
    """
    seconds = 0.0
    for hop in path:
        peers = hop.members * (hop.units - 1)
        seconds += hop.steps * hop.level.latency_s + peers * bytes / size**2 / hop.bytes_per_s
    return seconds


def _bus_bytes_per_s(path: tuple[Hop, ...]) -> float:
    """Bandwidth of the members' rings together: all enter the narrowest level at once."""
    return min(hop.members * hop.bytes_per_s for hop in path)


def _size(path: tuple[Hop, ...]) -> int:
    return path[-1].members * path[-1].units


def _members(level: Level, group: Group, world_size: int) -> int:
    """How many ranks of a group share one unit of a level (all of them: the group is inside)."""
    span = level.span_devices
    if span == world_size or span % (group.size * group.stride) == 0:
        return group.size
    if span % group.stride:
        return 1
    return gcd(span // group.stride, group.size)
