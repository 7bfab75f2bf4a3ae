"""The link between any two devices of a cluster, and the slowest among many.

What is known of a pair is laid over what is known less closely: the level where the two meet (as
slow as the slower end's island and node make it), then the entry of their islands, the measured
matrix, the entry of their nodes, the entry of the two devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import InvalidInput
from .levels import Level
from .pairs import Pair, PairMatrix

if TYPE_CHECKING:
    from .cluster import Cluster


@dataclass(frozen=True, slots=True)
class Link:
    """From one rank to another: `bandwidth_bytes_per_s` is what large messages reach alone.

    `measured` says whether the bandwidth was measured on this link, rather than taken from its
    level.
    """

    source: int
    target: int
    latency_s: float
    bandwidth_bytes_per_s: float
    measured: bool
    level: str


@dataclass(frozen=True, slots=True)
class _Class:
    """What decides the unmeasured links of a rank: its island, what its node has left of its
    bandwidth, and whether the matrix covers it."""

    island: int
    fraction: float
    in_matrix: bool


_ISLAND = 0
"""Instead of a span: whole islands."""


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Ranks of one unit of `span` devices and of different units of `inside` devices."""

    level: int
    span: int
    inside: int
    between_nodes: bool


@dataclass(frozen=True, slots=True, eq=False)
class Links:
    """Everything that `pair` and `slowest` look up; `links_of` makes it of a cluster."""

    devices_per_node: int
    levels: tuple[tuple[Level, ...], ...]  # of each island
    island_of_node: NDArray[np.int64]
    fraction_of_node: Mapping[int, float]
    devices: Mapping[tuple[int, int], Pair]  # both directions of every entry
    nodes: Mapping[tuple[int, int], Pair]
    islands: Mapping[tuple[int, int], Pair]
    first_node: int
    matrix: NDArray[np.float64] | None
    relative: NDArray[np.float64] | None  # the matrix over the fastest of each pair's kind

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return len(self.island_of_node) * self.devices_per_node

    def pair(self, source: int, target: int) -> Link:
        """The link from one rank to another; raises InvalidInput for unknown or equal ranks."""
        for rank in (source, target):
            if not 0 <= rank < self.world_size:
                raise InvalidInput(f"rank {rank}: expected 0 to {self.world_size - 1}")
        if source == target:
            raise InvalidInput(f"link from rank {source} to itself: expected two ranks")
        nodes = source // self.devices_per_node, target // self.devices_per_node
        ends = self._class(nodes[0]), self._class(nodes[1])
        level = self.meet(source, target)
        latency_s, bandwidth, measured = self._default(level, ends, nodes[0] != nodes[1])
        if nodes[0] != nodes[1]:
            if self.matrix is not None and ends[0].in_matrix and ends[1].in_matrix:
                place = nodes[0] - self.first_node, nodes[1] - self.first_node
                bandwidth, measured = float(self.matrix[place]), True
            if nodes in self.nodes:
                state = latency_s, bandwidth, measured
                latency_s, bandwidth, measured = _laid_over(self.nodes[nodes], *state)
        if (source, target) in self.devices:
            over = self.devices[source, target]
            latency_s, bandwidth, measured = _laid_over(over, latency_s, bandwidth, measured)
        name = self.levels[0][level].name
        return Link(source, target, latency_s, bandwidth, measured, name)

    def slowest(self, ranks: Iterable[int]) -> Link:
        """The link of least bandwidth between any two of the ranks, of the greatest latency among
        equals where they were compared.

        Takes time linear in the ranks and the entries. Raises InvalidInput for fewer than two
        ranks or an unknown one.
        """
        members = sorted(set(ranks))
        if len(members) < 2:
            raise InvalidInput(f"slowest link among {len(members)} ranks: expected at least 2")
        for rank in (members[0], members[-1]):
            if not 0 <= rank < self.world_size:
                raise InvalidInput(f"rank {rank}: expected 0 to {self.world_size - 1}")
        by_node: dict[int, list[int]] = defaultdict(list)
        for rank in members:
            by_node[rank // self.devices_per_node].append(rank)
        witnesses = [
            *self._entry_witnesses(set(members), by_node),
            *self._matrix_witnesses(by_node),
            *self._default_witnesses(members),
        ]
        links = [self.pair(a, b) for pair in witnesses for a, b in (pair, pair[::-1])]
        return min(links, key=lambda link: (link.bandwidth_bytes_per_s, -link.latency_s))

    def between_nodes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nodes, nodes) latencies in s and bandwidths in bytes/s of a device of one node to one of
        another; 0 and infinite on the diagonal.

        As `pair` has them, but without entries of two devices, and of a matrix counts how a pair
        compares with the fastest of its kind: of what a level promises, a share for every device
        of a node, that much is left. No link is faster than it was measured.
        """
        nodes = len(self.island_of_node)
        island = self.island_of_node
        level = self._meeting_level()
        latency = np.array([[at.latency_s for at in levels] for levels in self.levels])
        reach = np.array([[at.reached_bytes_per_s(1) for at in levels] for levels in self.levels])
        left = np.array([self.fraction_of_node.get(node, 1.0) for node in range(nodes)])
        measured = slice(0, 0)
        if self.relative is not None:
            measured = slice(self.first_node, self.first_node + len(self.relative))
        latency_s = np.maximum(latency[island[:, None], level], latency[island[None, :], level])

        def promised(left: NDArray[np.float64]) -> NDArray[np.float64]:
            one, other = island[:, None], island[None, :]
            found: NDArray[np.float64] = np.minimum(
                reach[one, level] * left[:, None], reach[other, level] * left[None, :]
            )
            return found

        bandwidth = promised(left)
        # a measurement goes before what is said of a node
        bandwidth[measured, measured] = promised(np.ones(nodes))[measured, measured]
        for (first, second), entry in self.islands.items():
            where = np.ix_(island == first, island == second)
            _lay_over_array(entry, where, latency_s, bandwidth)
        if self.relative is not None and self.matrix is not None:
            left_of = bandwidth[measured, measured] * self.relative
            bandwidth[measured, measured] = np.minimum(left_of, self.matrix)
        for ends, entry in self.nodes.items():
            _lay_over_array(entry, ends, latency_s, bandwidth)
        np.fill_diagonal(latency_s, 0.0)
        np.fill_diagonal(bandwidth, np.inf)
        return latency_s, bandwidth

    def _meeting_level(self) -> NDArray[np.int64]:
        """(nodes, nodes): index of the innermost level that joins two nodes."""
        nodes = np.arange(len(self.island_of_node))
        found = np.full((len(nodes), len(nodes)), len(self.levels[0]) - 1)
        for i, level in reversed(list(enumerate(self.levels[0]))):
            first = nodes * self.devices_per_node
            unit = self.island_of_node if level.whole_island else first // level.span_devices
            found[unit[:, None] == unit[None, :]] = i
        return found

    def _class(self, node: int) -> _Class:
        size = 0 if self.matrix is None else len(self.matrix)
        return _Class(
            int(self.island_of_node[node]),
            self.fraction_of_node.get(node, 1.0),
            0 <= node - self.first_node < size,
        )

    def meet(self, source: int, target: int) -> int:
        """Index of the innermost level that joins two ranks."""
        for i, level in enumerate(self.levels[0]):
            if level.whole_island:
                nodes = source // self.devices_per_node, target // self.devices_per_node
                if self.island_of_node[nodes[0]] == self.island_of_node[nodes[1]]:
                    return i
            elif source // level.span_devices == target // level.span_devices:
                return i
        raise AssertionError("the outermost level spans the cluster")

    def _default(
        self, level: int, ends: tuple[_Class, _Class], between_nodes: bool
    ) -> tuple[float, float, bool]:
        """Latency, bandwidth and whether measured, of classes of ranks that meet at a level."""
        versions = [self.levels[end.island][level] for end in ends]
        fractions = [end.fraction if between_nodes else 1.0 for end in ends]
        latency_s = max(version.latency_s for version in versions)
        bandwidth = min(
            version.reached_bytes_per_s(1) * fraction
            for version, fraction in zip(versions, fractions, strict=True)
        )
        between = self.islands.get((ends[0].island, ends[1].island))
        if between is None:
            return latency_s, bandwidth, False
        return _laid_over(between, latency_s, bandwidth, False)

    def _entry_witnesses(
        self, members: set[int], by_node: Mapping[int, Sequence[int]]
    ) -> Iterator[tuple[int, int]]:
        """A pair of ranks for every entry of two devices or two nodes."""
        for source, target in self.devices:
            if source in members and target in members:
                yield source, target
        for first, second in self.nodes:
            for pair in product(by_node.get(first, ()), by_node.get(second, ())):
                if pair not in self.devices:
                    yield pair
                    break

    def _matrix_witnesses(self, by_node: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, int]]:
        """The slowest pair of the matrix that no entry governs."""
        if self.matrix is None:
            return
        size = len(self.matrix)
        places = [n - self.first_node for n in by_node if 0 <= n - self.first_node < size]
        inside = self.matrix[np.ix_(places, places)]
        for flat in np.argsort(inside, axis=None, kind="stable"):
            i, j = divmod(int(flat), len(places))
            nodes = places[i] + self.first_node, places[j] + self.first_node
            if i == j or nodes in self.nodes:
                continue
            for pair in product(by_node[nodes[0]], by_node[nodes[1]]):
                if pair not in self.devices:
                    yield pair
                    return

    def _default_witnesses(self, members: Sequence[int]) -> Iterator[tuple[int, int]]:
        """A pair of ranks for the slowest link of each kind of meeting that nothing measured
        governs."""
        classes = {n: self._class(n) for n in {r // self.devices_per_node for r in members}}
        for meeting in self._meetings():
            slowest = inf
            found: tuple[int, int] | None = None
            for groups in self._units(meeting, members, classes).values():
                for ends in product(groups, groups):
                    if meeting.between_nodes and ends[0].in_matrix and ends[1].in_matrix:
                        continue
                    _, bandwidth, _ = self._default(meeting.level, ends, meeting.between_nodes)
                    if bandwidth < slowest:
                        pair = self._ungoverned(groups[ends[0]], groups[ends[1]])
                        if pair is not None:
                            slowest, found = bandwidth, pair
            if found is not None:
                yield found

    def _meetings(self) -> Iterator[_Meeting]:
        """Every way in which two ranks can meet; a level may join them within a node and beyond."""
        inside = 1
        for i, level in enumerate(self.levels[0]):
            span = _ISLAND if level.whole_island else level.span_devices
            if span != _ISLAND and span <= self.devices_per_node:
                yield _Meeting(i, span, inside, between_nodes=False)
            elif inside != _ISLAND and inside < self.devices_per_node:
                yield _Meeting(i, self.devices_per_node, inside, between_nodes=False)
                yield _Meeting(i, span, self.devices_per_node, between_nodes=True)
            else:
                yield _Meeting(i, span, inside, between_nodes=True)
            inside = span

    def _units(
        self, meeting: _Meeting, members: Sequence[int], classes: Mapping[int, _Class]
    ) -> dict[int, dict[_Class, dict[int, list[int]]]]:
        """Ranks by the unit they meet in, by class, by the unit inside it."""
        units: dict[int, dict[_Class, dict[int, list[int]]]] = {}
        for rank in members:
            of_rank = classes[rank // self.devices_per_node]
            unit, inside = (
                of_rank.island if span == _ISLAND else rank // span
                for span in (meeting.span, meeting.inside)
            )
            groups = units.setdefault(unit, {}).setdefault(of_rank, {})
            groups.setdefault(inside, []).append(rank)
        return units

    def _ungoverned(
        self, sources: Mapping[int, Sequence[int]], targets: Mapping[int, Sequence[int]]
    ) -> tuple[int, int] | None:
        """Two ranks of different inner units whose link has no entry of its own."""
        for (first, here), (second, there) in product(sources.items(), targets.items()):
            for pair in product(here, there) if first != second else ():
                nodes = pair[0] // self.devices_per_node, pair[1] // self.devices_per_node
                if nodes not in self.nodes and pair not in self.devices:
                    return pair
        return None


def _laid_over(
    entry: Pair, latency_s: float, bandwidth: float, measured: bool
) -> tuple[float, float, bool]:
    if entry.latency_s is not None:
        latency_s = entry.latency_s
    if entry.bandwidth_bytes_per_s is not None:
        return latency_s, entry.bandwidth_bytes_per_s, True
    if entry.bandwidth_fraction is not None:
        return latency_s, bandwidth * entry.bandwidth_fraction, False
    return latency_s, bandwidth, measured


def _lay_over_array(
    entry: Pair, where: Any, latency_s: NDArray[np.float64], bandwidth: NDArray[np.float64]
) -> None:
    """`_laid_over` of all links in a part of two arrays."""
    if entry.latency_s is not None:
        latency_s[where] = entry.latency_s
    if entry.bandwidth_bytes_per_s is not None:
        bandwidth[where] = entry.bandwidth_bytes_per_s
    elif entry.bandwidth_fraction is not None:
        bandwidth[where] *= entry.bandwidth_fraction


def links_of(cluster: Cluster) -> Links:
    """What is known of a cluster's links, ready to be looked up."""
    index = {island.name: i for i, island in enumerate(cluster.islands)}
    tables: dict[str, dict[tuple[int, int], Pair]] = {"devices": {}, "nodes": {}, "islands": {}}
    for entry in cluster.pairs:
        first, second = (
            index.get(str(end), 0) if entry.islands else int(end) for end in entry.ends
        )
        tables[entry.kind][first, second] = entry
    for table in tables.values():
        table |= {(b, a): entry for (a, b), entry in table.items() if (b, a) not in table}
    clean = relative = None
    if cluster.matrix is not None:
        clean = without_noise(cluster, cluster.matrix)[0]
        kinds = _kinds(cluster, cluster.matrix)
        others = ~np.eye(cluster.matrix.size, dtype=bool)
        relative = np.ones_like(clean)
        for kind in np.unique(kinds[others]):
            chosen = (kinds == kind) & others
            relative[chosen] = clean[chosen] / clean[chosen].max()
    return Links(
        devices_per_node=cluster.devices_per_node,
        levels=cluster.island_levels,
        island_of_node=island_of_node(cluster),
        fraction_of_node={
            node: entry.bandwidth_fraction for entry in cluster.degraded for node in entry.nodes
        },
        **tables,
        first_node=0 if cluster.matrix is None else cluster.matrix.first_node,
        matrix=clean,
        relative=relative,
    )


def island_of_node(cluster: Cluster) -> NDArray[np.int64]:
    """Index of each node's island; zeros where the cluster has none."""
    sizes = [island.nodes for island in cluster.islands] or [cluster.nodes]
    return np.repeat(np.arange(len(sizes)), sizes)


def without_noise(
    cluster: Cluster, matrix: PairMatrix
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrix with what its noise floor cannot tell apart made equal, and each pair's ratio.

    A pair is compared to the median of its kind: pairs that meet at the same level, in the same
    islands. One that differs from it by no more than the floor gets the median. The second array,
    (size, size) as the first, is the measured bandwidth over that median.
    """
    measured = matrix.bandwidth_bytes_per_s
    off_diagonal = ~np.eye(matrix.size, dtype=bool)
    kinds = _kinds(cluster, matrix)
    median = np.full_like(measured, np.inf)
    for kind in np.unique(kinds[off_diagonal]):
        chosen = (kinds == kind) & off_diagonal
        median[chosen] = np.median(measured[chosen])
    ratio = np.divide(measured, median, out=np.ones_like(measured), where=off_diagonal)
    told_apart = np.abs(ratio - 1) > matrix.noise_floor_fraction
    return np.where(told_apart, measured, median), ratio


def _kinds(cluster: Cluster, matrix: PairMatrix) -> NDArray[np.int64]:
    """(size, size): equal numbers where pairs of nodes meet at the same level in the same islands,
    whichever comes first."""
    nodes = np.arange(matrix.first_node, matrix.first_node + matrix.size)
    island = island_of_node(cluster)[nodes]
    level = np.full((matrix.size, matrix.size), len(cluster.levels))
    for i, at in reversed(list(enumerate(cluster.levels))):
        unit = island if at.whole_island else nodes * cluster.devices_per_node // at.span_devices
        level[unit[:, None] == unit[None, :]] = i
    low, high = np.minimum.outer(island, island), np.maximum.outer(island, island)
    islands = len(cluster.islands) + 1
    return (level * islands + low) * islands + high
