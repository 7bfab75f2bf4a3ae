"""Who measures with whom: rounds of disjoint pairs, and the natural groups of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import InvalidInput

Pairs = tuple[tuple[int, int], ...]


def rounds(ranks: int) -> tuple[Pairs, ...]:
    """All pairs of ranks, each once, in rounds in which every rank has at most one partner.

    The circle method of round-robin tournaments (Kirkman 1850): one rank stays, the others turn.
    n ranks take n-1 rounds, n where n is odd and one rank rests.
    """
    seats = ranks + ranks % 2
    turning = seats - 1
    found = []
    for turn in range(turning):
        pairs = [(turn, turning)]
        for k in range(1, seats // 2):
            pairs.append(((turn - k) % turning, (turn + k) % turning))
        ordered = sorted((min(a, b), max(a, b)) for a, b in pairs)
        found.append(tuple((a, b) for a, b in ordered if b < ranks))
    return tuple(found) if ranks > 1 else ()


@dataclass(frozen=True, slots=True)
class Nodes:
    """`nodes` machines with `devices_per_node` ranks each, laid out machine by machine."""

    nodes: int
    devices_per_node: int
    hosts: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.devices_per_node

    def node_of(self, rank: int) -> int:
        """Number of the machine of a rank."""
        return rank // self.devices_per_node


def nodes_of(hosts: tuple[str, ...]) -> Nodes:
    """The machines of ranks, from the host name of each rank.

    Raises InvalidInput if ranks are not laid out machine by machine or if machines have unequal
    numbers of them, which a cluster file cannot say.
    """
    runs: list[tuple[str, int]] = []
    for host in hosts:
        if runs and runs[-1][0] == host:
            runs[-1] = (host, runs[-1][1] + 1)
        else:
            runs.append((host, 1))
    names = [host for host, _ in runs]
    for host in names:
        if names.count(host) > 1:
            ranks = [rank for rank, name in enumerate(hosts) if name == host]
            raise InvalidInput(
                f"host {host} has ranks {', '.join(map(str, ranks[:8]))} with others between, "
                "expected neighbouring ranks: start the ranks machine by machine "
                "(srun --distribution=block)"
            )
    sizes = {count: host for host, count in reversed(runs)}
    if len(sizes) > 1:
        (some, first), (other, second) = sorted(sizes.items())[:2]
        raise InvalidInput(
            f"host {first} has {some} ranks and host {second} has {other}, "
            "expected as many on every machine"
        )
    return Nodes(len(runs), runs[0][1], tuple(names))


@dataclass(frozen=True, slots=True)
class Family:
    """Disjoint groups of one shape that run at the same time, as those of a mesh axis do.

    `shape` as in `costmodel.curves`: how many devices of a node, then how many nodes.
    """

    name: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Ranks of one group."""
        return len(self.groups[0])

    def group_of(self, rank: int) -> tuple[int, ...] | None:
        """The group of a rank; None where it is in none (nodes that do not divide evenly)."""
        return next((group for group in self.groups if rank in group), None)


def families(nodes: Nodes) -> tuple[Family, ...]:
    """Runs of 2, 4, 8, … neighbours inside nodes, whole nodes, runs of 2, 4, … whole nodes, one
    device of every node, and all; each shape once, smallest groups first."""
    per_node, count = nodes.devices_per_node, nodes.nodes
    found: list[Family] = []
    for size in [*_powers_of_two(per_node), per_node]:
        blocks = tuple(
            tuple(range(first, first + size))
            for node in range(count)
            for first in range(node * per_node, (node + 1) * per_node - size + 1, size)
        )
        name = "node" if size == per_node else f"{size} of a node"
        found.append(Family(name, (size,), blocks))
    if count > 1:
        across = tuple(tuple(range(first, nodes.world_size, per_node)) for first in range(per_node))
        found.append(Family("one per node", _trimmed(1, count, nodes), across))
        for some in [*_powers_of_two(count), count]:
            size = some * per_node
            blocks = tuple(
                tuple(range(first, first + size))
                for first in range(0, nodes.world_size - size + 1, size)
            )
            name = "all" if some == count else f"{some} nodes"
            found.append(Family(name, _trimmed(per_node, some, nodes), blocks))
    unique: dict[tuple[int, ...], Family] = {}
    for family in found:
        if family.size > 1:
            unique.setdefault(family.shape, family)
    return tuple(sorted(unique.values(), key=lambda family: (family.size, family.shape)))


def send_shape(nodes: Nodes, first: int, second: int) -> tuple[int, ...]:
    """The shape under which `costmodel.curves` keeps a message between two ranks."""
    if nodes.node_of(first) == nodes.node_of(second):
        return (2,)
    return _trimmed(1, 2, nodes)


def _trimmed(of_a_node: int, nodes: int, layout: Nodes) -> tuple[int, ...]:
    """A shape over the levels that the cluster file has: nodes of one device are no level."""
    if layout.devices_per_node == 1:
        return (nodes,)
    return (of_a_node, nodes)


def _powers_of_two(below: int) -> list[int]:
    return [2**k for k in range(1, below.bit_length()) if 2**k < below]
