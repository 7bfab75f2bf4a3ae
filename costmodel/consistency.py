"""What the parts of a cluster must agree on: spans, islands, pairs, measurements.

Each check raises `Misfit` naming the first field that does not fit; `Cluster` runs them all.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

from .yaml_files import Misfit, nearest

if TYPE_CHECKING:
    from .cluster import Cluster


def check(cluster: Cluster) -> None:
    """Raises Misfit where the fields of a cluster contradict each other."""
    _islands(cluster)
    _levels(cluster)
    _pairs(cluster)
    _degraded(cluster)
    _matrix(cluster)
    _curves(cluster)


def _levels(cluster: Cluster) -> None:
    inner = 1
    per_node = cluster.devices_per_node
    for i, level in enumerate(cluster.levels):
        place = "levels", i, "span_devices"
        span = level.span_devices
        if level.whole_island:
            _island_level(cluster, i)
        if level.torus is not None:
            _torus_level(cluster, i)
        if span % inner:
            raise Misfit(
                f"is {span}, expected a multiple of {inner}, the span of the level inside it",
                *place,
            )
        if span % per_node and per_node % span:
            raise Misfit(
                f"is {span}, expected part of a node or whole nodes of {per_node} devices", *place
            )
        inner = span
    last = cluster.levels[-1]
    if inner != cluster.world_size or (last.whole_island and len(cluster.islands) > 1):
        missing = ""
        if len(cluster.islands) > 1:
            first, second = (repr(island.name) for island in cluster.islands[:2])
            missing = f"; nothing joins islands {first} and {second}: add a level for the cluster"
        elif cluster.nodes > 1 and inner <= per_node:
            missing = "; nothing joins the nodes: add a level for the cluster"
        raise Misfit(
            f"is {inner if not last.whole_island else repr('island')}, expected the whole cluster: "
            f"{cluster.nodes} nodes x {per_node} = {cluster.world_size}{missing}",
            "levels",
            len(cluster.levels) - 1,
            "span_devices",
        )


def _torus_level(cluster: Cluster, i: int) -> None:
    level = cluster.levels[i]
    if i:
        inner = cluster.levels[0].name
        raise Misfit(f"is a torus outside of {inner!r}, expected the innermost level", "levels", i)
    for name in ("fabric", "pair_bandwidth_bytes_per_s"):
        if getattr(level, name) is not None:
            raise Misfit("is given for a torus, expected one or the other", "levels", i, name)


def _island_level(cluster: Cluster, i: int) -> None:
    place = "levels", i, "span_devices"
    if not cluster.islands:
        raise Misfit("is 'island', but the cluster has none: expected islands, or a number", *place)
    if any(level.whole_island for level in cluster.levels[:i]):
        raise Misfit("is 'island' as of a level inside it, expected one such level", *place)
    common = gcd(*(island.nodes for island in cluster.islands)) * cluster.devices_per_node
    if cluster.levels[i].span_devices != common:
        raise Misfit(
            f"is {cluster.levels[i].span_devices}, expected 'island' (blocks of {common} devices "
            "fit every island)",
            *place,
        )
    ends = set()
    end = 0
    for island in cluster.islands:
        end += island.nodes * cluster.devices_per_node
        ends.add(end)
    for j, outer in enumerate(cluster.levels[i + 1 :], i + 1):
        for boundary in range(outer.span_devices, cluster.world_size, outer.span_devices):
            if boundary not in ends:
                raise Misfit(
                    f"is {outer.span_devices}, expected whole islands, which end at device "
                    f"{', '.join(map(str, sorted(ends)[:4]))}",
                    "levels",
                    j,
                    "span_devices",
                )


def _islands(cluster: Cluster) -> None:
    if not cluster.islands:
        return
    seen: dict[str, int] = {}
    names = [level.name for level in cluster.levels]
    for i, island in enumerate(cluster.islands):
        if island.name in seen:
            raise Misfit(
                f"is {island.name!r} as islands[{seen[island.name]}].name, expected another name",
                "islands",
                i,
                "name",
            )
        seen[island.name] = i
        changed: set[str] = set()
        for j, change in enumerate(island.levels):
            if change.name not in names:
                raise Misfit(
                    f"is {change.name!r}, expected the name of a level of the cluster: "
                    f"{nearest(change.name, names)}",
                    *("islands", i, "levels", j, "name"),
                )
            if change.name in changed:
                raise Misfit(
                    f"is {change.name!r}, which is given twice in this island",
                    *("islands", i, "levels", j, "name"),
                )
            changed.add(change.name)
    if changed_twice := {name for name in names if names.count(name) > 1}:
        i = max(i for i, name in enumerate(names) if name in changed_twice)
        raise Misfit(f"is {names[i]!r} again, expected another name", "levels", i, "name")
    total = sum(island.nodes for island in cluster.islands)
    if total != cluster.nodes:
        raise Misfit(
            f"is {cluster.nodes}, expected {total}, the nodes of the islands together", "nodes"
        )


def _pairs(cluster: Cluster) -> None:
    islands = {island.name for island in cluster.islands}
    counts = {"devices": cluster.world_size, "nodes": cluster.nodes}
    seen: dict[tuple[str, object], int] = {}
    for i, pair in enumerate(cluster.pairs):
        place = "pairs", i, pair.kind
        for end in pair.ends:
            if isinstance(end, str):
                if end not in islands:
                    known = nearest(end, islands) if islands else "the cluster has none"
                    raise Misfit(f"names the unknown island {end!r}: {known}", *place)
            elif end >= counts[pair.kind]:
                raise Misfit(
                    f"is {list(pair.ends)}, expected {pair.kind} 0 to {counts[pair.kind] - 1}",
                    *place,
                )
        key = pair.kind, pair.ends
        if key in seen:
            raise Misfit(
                f"is {list(pair.ends)}, which pairs[{seen[key]}] gives already: keep one", *place
            )
        seen[key] = i


def _degraded(cluster: Cluster) -> None:
    seen: dict[int, int] = {}
    for i, entry in enumerate(cluster.degraded):
        place = "degraded", i, "nodes"
        for node in entry.nodes:
            if node >= cluster.nodes:
                raise Misfit(f"names node {node}, expected 0 to {cluster.nodes - 1}", *place)
            if node in seen:
                raise Misfit(f"names node {node}, which degraded[{seen[node]}] does", *place)
            seen[node] = i


def _matrix(cluster: Cluster) -> None:
    matrix = cluster.matrix
    if matrix is not None and matrix.first_node + matrix.size > cluster.nodes:
        raise Misfit(
            f"has {matrix.size} nodes from node {matrix.first_node} on, expected nodes "
            f"0 to {cluster.nodes - 1}",
            "matrix",
            "rows",
        )


def _curves(cluster: Cluster) -> None:
    seen: dict[tuple[str, tuple[int, ...]], int] = {}
    for i, curve in enumerate(cluster.curves):
        place = "curves", i, "shape"
        shape = tuple(curve.shape)
        if len(shape) > len(cluster.levels):
            raise Misfit(
                f"is {list(shape)}, expected a number for each of the {len(cluster.levels)} levels "
                "at most, innermost first",
                *place,
            )
        inside = 1
        for level, units in zip(cluster.levels, shape, strict=False):
            room = cluster.world_size if level.whole_island else level.span_devices
            if units * inside > room:
                raise Misfit(
                    f"is {list(shape)}, expected at most {room} devices in level {level.name!r}",
                    *place,
                )
            inside *= units
        key = curve.collective, shape
        if key in seen:
            raise Misfit(
                f"is {list(shape)}, of which curves[{seen[key]}] has the {curve.collective} "
                "already: keep one",
                *place,
            )
        seen[key] = i
