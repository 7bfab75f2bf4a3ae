"""The cluster file of what was found."""

from __future__ import annotations

from itertools import combinations

from ..cluster import Cluster, Degraded, Level, Pair
from ..device import Device
from .findings import Findings
from .fit import Line

_DIGITS = 4


def cluster_of(found: Findings, device: Device, name: str) -> Cluster:
    """Levels from messages between usual pairs, all curves, and entries for what is slower.

    What one device reaches with one other is what it can send: nothing is taken off
    (`achieved_fraction` 1). Raises InvalidInput where the figures make no cluster.
    """
    nodes = found.nodes
    levels = []
    if found.inside is not None:
        levels.append(_level("node", nodes.devices_per_node, found.inside))
    if found.across is not None:
        levels.append(_level("network", nodes.world_size, found.across))
    return Cluster(
        name=name,
        device=device,
        nodes=nodes.nodes,
        devices_per_node=nodes.devices_per_node,
        levels=tuple(levels),
        pairs=tuple(_pairs(found)),
        degraded=tuple(
            Degraded(nodes=slow.ends, bandwidth_fraction=_short(1 / slow.times_longer))
            for slow in found.slow_nodes
        ),
        curves=tuple(
            curve.model_copy(update={"seconds": tuple(map(_short, curve.seconds))})
            for curve in found.curves
        ),
    )


def _level(name: str, span_devices: int, line: Line) -> Level:
    return Level(
        name=name,
        span_devices=span_devices,
        latency_s=_short(line.latency_s),
        bandwidth_bytes_per_s=_short(line.bandwidth_bytes_per_s),
        achieved_fraction=1.0,
    )


def _pairs(found: Findings) -> list[Pair]:
    """Slow links as measured; of a slow device, all links to the rest of its node."""
    entries = {}
    per_node = found.nodes.devices_per_node
    for slow in found.slow_devices:
        first = slow.ends[0] // per_node * per_node
        for ends in combinations(range(first, first + per_node), 2):
            if slow.ends[0] in ends:
                fraction = _short(1 / slow.times_longer)
                entries[ends] = Pair(devices=ends, bandwidth_fraction=fraction)
    for link in found.slow_links:
        entries[link.ends] = Pair(
            devices=link.ends,
            bandwidth_bytes_per_s=_short(link.line.bandwidth_bytes_per_s),
            latency_s=_short(link.line.latency_s),
        )
    between = [
        Pair(
            nodes=link.ends,
            bandwidth_bytes_per_s=_short(link.line.bandwidth_bytes_per_s),
            latency_s=_short(link.line.latency_s),
        )
        for link in found.slow_node_links
    ]
    return [*entries.values(), *between]


def _short(value: float) -> float:
    """As many digits as a measurement has."""
    return float(f"{value:.{_DIGITS}g}")
