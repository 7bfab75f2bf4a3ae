"""What the measurements of all ranks say: curves, lines per level, slow links and slow nodes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..curves import CollectiveKind, Curve
from .exchange import moved_bytes
from .fit import Line, fitted_line
from .noise import (
    Array,
    Noise,
    Slow,
    asymmetry_fraction,
    lasting_excess,
    padded,
    repeats_of,
    slow_ends_and_links,
    symmetrised,
    threshold_fraction,
)
from .rounds import Nodes, send_shape
from .run import Measured

_LARGE_BYTES = 2**20
"""From here on a message is bound by bandwidth rather than by latency."""
_SURELY_LATE_FRACTION = 0.4
"""How much more often than by chance a rank must come last to be called late."""


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A link of one rank or node with another, against the others of its kind."""

    ends: tuple[int, int]
    times_longer: float
    line: Line


@dataclass(frozen=True, slots=True)
class Late:
    """A rank that keeps the others waiting: how often it was last, and by how much (median)."""

    rank: int
    last_fraction: float
    late_s: float


@dataclass(frozen=True, slots=True)
class Findings:
    """`levels` are the lines of a message between two devices of a node and of two nodes, None
    where there are no such pairs. `floor_fraction` is the difference between two links that the
    measurement cannot tell from chance. Nodes and ranks are by number.
    """

    nodes: Nodes
    curves: tuple[Curve, ...]
    inside: Line | None
    across: Line | None
    slow_devices: tuple[Slow, ...]
    slow_links: tuple[SlowLink, ...]
    slow_nodes: tuple[Slow, ...]
    slow_node_links: tuple[SlowLink, ...]
    late: tuple[Late, ...]
    links: Noise
    groups: Noise
    floor_fraction: float
    asymmetry_fraction: float


def findings(measured: Measured, source: str) -> Findings:
    """Reads the measurements; `source` is what the curves say of where they come from."""
    nodes = measured.nodes
    links = _Links.of(measured)
    group_curves, groups = _collective_curves(measured, source)
    meets = _meeting(nodes)
    both = _complete({size: symmetrised(s) for size, s in links.seconds.items()}, meets)
    typical = {
        kind: {
            size: float(np.nanmedian(seconds[meets == kind]))
            for size, seconds in both.items()
            if np.isfinite(seconds[meets == kind]).any()
        }
        for kind in (0, 1)
    }
    floor = threshold_fraction(links.judged.floor_fraction, int((meets >= 0).sum()) // 2)
    usual = [Line(*_line(points)) if points else None for points in typical.values()]
    slow = _slow(nodes, both, meets, floor)
    send_curves = [
        Curve(
            collective="send",
            shape=send_shape(nodes, 0, 1 if kind == 0 else nodes.devices_per_node),
            bytes=tuple(map(float, points)),
            seconds=tuple(points.values()),
            source=source,
            as_is=True,
        )
        for kind, points in typical.items()
        if points
    ]
    return Findings(
        nodes,
        (*send_curves, *group_curves),
        usual[0],
        usual[1],
        *slow,
        _late(measured.waited_s),
        Noise.over(links.noise.values()),
        groups,
        floor,
        max((asymmetry_fraction(links.seconds[n]) for n in _judged(both)), default=0.0),
    )


def _complete(both: dict[int, Array], meets: NDArray[np.int64]) -> dict[int, Array]:
    """The sizes at which every link was measured (time may have run out in the middle of one);
    all where there is none, so that something is known."""
    whole = {size: s for size, s in both.items() if np.isfinite(s[meets >= 0]).all()}
    return whole or both


def _line(points: dict[int, float]) -> tuple[float, float]:
    line = fitted_line(list(points), list(points.values()))
    return line.latency_s, line.bandwidth_bytes_per_s


@dataclass(frozen=True, slots=True)
class _Links:
    """Median seconds from rank to rank (n, n), by size, and how well those of each size repeat."""

    seconds: dict[int, Array]
    noise: dict[int, Noise]

    @staticmethod
    def of(measured: Measured) -> _Links:
        size = measured.nodes.world_size
        columns: dict[int, list[int]] = defaultdict(list)
        for column, item in enumerate(measured.items):
            if item.series.kind == "send":
                columns[item.bytes].append(column)
        ends = [np.array(pairs).reshape(-1, 2).T for pairs in measured.rounds]
        seconds, noise = {}, {}
        for bytes, of_size in sorted(columns.items()):
            turns = [measured.items[column].round for column in of_size]
            seen: Counter[int] = Counter()
            samples = np.full((size, size, max(Counter(turns).values())), np.nan)
            for turn, column in zip(turns, of_size, strict=True):
                first, second = ends[turn]
                samples[first, second, seen[turn]] = measured.seconds[first, column]
                samples[second, first, seen[turn]] = measured.seconds[second, column]
                seen[turn] += 1
            repeats = repeats_of(samples.reshape(size * size, -1))
            seconds[bytes] = repeats.median.reshape(size, size)
            noise[bytes] = repeats.noise
        return _Links(seconds, noise)

    @property
    def judged(self) -> Noise:
        """Noise of the sizes by which links are judged."""
        return Noise.over(self.noise[size] for size in _judged(self.noise))


def _judged(sizes: Iterable[int]) -> list[int]:
    """The sizes that are bound by bandwidth; all where none is."""
    return [size for size in sizes if size >= _LARGE_BYTES] or list(sizes)


def _collective_curves(measured: Measured, source: str) -> tuple[list[Curve], Noise]:
    """A curve per collective and family: a group's time is its slowest rank's, a family's the
    median of its groups'."""
    samples: dict[tuple[CollectiveKind, int, int, int], list[float]] = defaultdict(list)
    for column, item in enumerate(measured.items):
        if item.series.kind == "send":
            continue
        for at, group in enumerate(measured.families[item.series.family].groups):
            seconds = float(np.max(measured.seconds[list(group), column]))
            samples[item.series.kind, item.series.family, item.bytes, at].append(seconds)
    repeats = repeats_of(padded(list(samples.values())))
    medians: dict[tuple[CollectiveKind, int], dict[float, list[float]]] = defaultdict(dict)
    for (kind, family, bytes, _), median in zip(samples, repeats.median, strict=True):
        moved = float(moved_bytes(kind, bytes, measured.families[family].size))
        medians[kind, family].setdefault(moved, []).append(float(median))
    curves = [
        Curve(
            collective=kind,
            shape=measured.families[family].shape,
            bytes=tuple(sorted(points)),
            seconds=tuple(float(np.median(points[size])) for size in sorted(points)),
            source=source,
            as_is=True,
        )
        for (kind, family), points in sorted(medians.items())
    ]
    return curves, repeats.noise


def _meeting(nodes: Nodes) -> NDArray[np.int64]:
    """(n, n): 0 where two ranks share a node, 1 where they do not, -1 on the diagonal."""
    of = np.arange(nodes.world_size) // nodes.devices_per_node
    meets: NDArray[np.int64] = (of[:, None] != of[None, :]).astype(np.int64)
    np.fill_diagonal(meets, -1)
    return meets


def _slow(
    nodes: Nodes, both: dict[int, Array], meets: NDArray[np.int64], threshold: float
) -> tuple[tuple[Slow, ...], tuple[SlowLink, ...], tuple[Slow, ...], tuple[SlowLink, ...]]:
    """Slow devices and links, then slow nodes and links of nodes."""
    if not both:
        return (), (), (), ()
    large = [both[size] for size in _judged(both)]
    per_node = nodes.devices_per_node
    of = np.arange(nodes.world_size) // per_node

    between = [_between_nodes(seconds, nodes) for seconds in large]
    same = np.zeros((nodes.nodes, nodes.nodes), dtype=np.int64)
    slow_nodes, node_links = slow_ends_and_links(lasting_excess(between, same), threshold)

    # What a node or a link of nodes is slow by is not laid on its devices again.
    explained = np.zeros(same.shape)
    for node in slow_nodes:
        explained[node.ends[0], :] = explained[:, node.ends[0]] = np.log(node.times_longer)
    for link in node_links:
        a, b = link.ends
        explained[a, b] = explained[b, a] = np.log(link.times_longer)
    slow_devices: tuple[Slow, ...] = ()
    device_links: tuple[Slow, ...] = ()
    if per_node > 1:
        left = lasting_excess(large, meets) - explained[of[:, None], of[None, :]]
        slow_devices, device_links = slow_ends_and_links(left, threshold)

    def lined(slow: tuple[Slow, ...], of_nodes: bool) -> tuple[SlowLink, ...]:
        return tuple(
            SlowLink((s.ends[0], s.ends[1]), s.times_longer, _own_line(s, both, nodes, of_nodes))
            for s in slow
        )

    return slow_devices, lined(device_links, False), slow_nodes, lined(node_links, True)


def _between_nodes(seconds: Array, nodes: Nodes) -> Array:
    """Median seconds between the devices of two nodes (nodes, nodes), NaN on the diagonal."""
    width = nodes.devices_per_node
    between = np.full((nodes.nodes, nodes.nodes), np.nan)
    for a, b in combinations(range(nodes.nodes), 2):
        block = seconds[a * width : (a + 1) * width, b * width : (b + 1) * width]
        if np.isfinite(block).any():
            between[a, b] = between[b, a] = float(np.nanmedian(block))
    return between


def _own_line(slow: Slow, both: dict[int, Array], nodes: Nodes, of_nodes: bool) -> Line:
    """The line of one link: of two ranks, or the median of all ranks of two nodes."""
    width = nodes.devices_per_node if of_nodes else 1
    rows, columns = (slice(end * width, (end + 1) * width) for end in slow.ends)
    points = {
        size: float(np.nanmedian(seconds[rows, columns]))
        for size, seconds in both.items()
        if np.isfinite(seconds[rows, columns]).any()
    }
    return fitted_line(list(points), list(points.values()))


def _late(waited_s: Array) -> tuple[Late, ...]:
    """Ranks that come last again and again: they wait least while all others wait for them."""
    ranks, items = waited_s.shape
    if not items:
        return ()
    last = np.bincount(np.argmin(waited_s, axis=0), minlength=ranks) / items
    late_s = np.median(waited_s.max(axis=0)[None, :] - waited_s, axis=1)
    return tuple(
        Late(rank, float(last[rank]), float(late_s[rank]))
        for rank in np.argsort(-last)
        if last[rank] > 1 / ranks + _SURELY_LATE_FRACTION
    )
