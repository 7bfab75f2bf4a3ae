"""A cluster as plain data: the words that files use for spans, and other numbers of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING, Any

from .curves import Curve
from .device import Device
from .islands import Island

if TYPE_CHECKING:
    from .cluster import Cluster
    from .pairs import Pair, PairMatrix


def without_words(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data with `node`, `island` and `cluster` as numbers of devices, and `nodes` filled in.

    What is not as it should be is left for the validation of the fields to name.
    """
    data = dict(data)
    sizes = _island_sizes(data.get("islands"))
    if data.get("islands") and "nodes" not in data:
        data["nodes"] = sum(sizes) or 1  # where sizes are wrong the islands are to be named
    nodes, per_node, levels = (data.get(k) for k in ("nodes", "devices_per_node", "levels"))
    if isinstance(nodes, int) and isinstance(per_node, int) and isinstance(levels, list):
        words = {"node": per_node, "cluster": nodes * per_node}
        if sizes:
            words["island"] = gcd(*sizes) * per_node
        data["levels"] = [_with_span(level, words) for level in levels]
    return data


def _island_sizes(islands: Any) -> list[int]:
    """Nodes of each island as a file gives them; empty where they are not what they should be."""
    if not isinstance(islands, list | tuple):
        return []
    sizes = []
    for island in islands:
        size = island.nodes if isinstance(island, Island) else None
        if isinstance(island, Mapping):
            size = island.get("nodes")
        if not isinstance(size, int) or size < 1:
            return []
        sizes.append(size)
    return sizes


def _with_span(level: Any, words: Mapping[str, int]) -> Any:
    if not isinstance(level, Mapping):
        return level
    span = level.get("span_devices")
    if not isinstance(span, str) or span not in words:
        return level
    island = {"whole_island": True} if span == "island" else {}
    return {**level, "span_devices": words[span], **island}


def as_file(cluster: Cluster) -> dict[str, Any]:
    """Plain data of a cluster, without what is empty, spans that follow from the shape as words."""
    data = cluster.model_dump(exclude_none=True) | {"device": _full(cluster.device)}
    levels = [dict(level) for level in data["levels"]]
    for level in levels:
        if level.pop("whole_island"):
            level["span_devices"] = "island"
        elif level["span_devices"] == cluster.devices_per_node:
            level["span_devices"] = "node"
    if levels[-1]["span_devices"] != "island":
        levels[-1]["span_devices"] = "cluster"
    data["levels"] = levels
    for part in ("islands", "pairs", "degraded", "curves"):
        given = getattr(cluster, part)
        data[part] = [item.model_dump(exclude_none=True, exclude_defaults=True) for item in given]
    for island, dumped in zip(cluster.islands, data["islands"], strict=True):
        if island.device is not None:
            dumped["device"] = _full(island.device)
    if cluster.matrix is not None:
        data["matrix"] = cluster.matrix.model_dump(exclude_defaults=True)
    return {field: value for field, value in data.items() if value or field == "nodes"}


def _full(device: Device) -> dict[str, Any]:
    """All figures of a device, so that a later change of its preset changes no saved cluster."""
    return {k: v for k, v in device.model_dump(exclude_none=True).items() if v != ()}


def fitted(levels: list[Any], nodes: int, per_node: int) -> list[Any]:
    """Preset levels with numeric spans adapted to a job of `nodes` x `per_node` devices."""
    fitted = []
    for level in levels:
        span = level["span_devices"]
        if isinstance(span, int):
            if span < per_node and per_node % span:
                continue
            if span >= per_node:
                fitting = range(1, min(nodes, span // per_node) + 1)
                span = per_node * max(k for k in fitting if nodes % k == 0)
        fitted.append({**level, "span_devices": span})
    return fitted


def resized(cluster: Cluster, nodes: int) -> dict[str, Any]:
    """Plain data of the cluster with another number of nodes, see `Cluster.resized`."""
    data = as_file(cluster) | {"nodes": nodes}
    islands, left = [], nodes
    for i, island in enumerate(cluster.islands):
        size = left if i == len(cluster.islands) - 1 else min(left, island.nodes)
        if size:
            islands.append(island.model_copy(update={"nodes": size}))
        left -= size
    names = {island.name for island in islands}
    data["islands"] = islands
    data["levels"] = fitted(data["levels"], nodes, cluster.devices_per_node)
    bound = {"devices": nodes * cluster.devices_per_node, "nodes": nodes}
    data["pairs"] = [
        pair
        for pair in cluster.pairs
        if all(
            end in names if isinstance(end, str) else end < bound[pair.kind] for end in pair.ends
        )
    ]
    data["degraded"] = [
        entry.model_copy(update={"nodes": kept})
        for entry in cluster.degraded
        if (kept := tuple(node for node in entry.nodes if node < nodes))
    ]
    matrix = cluster.matrix
    data["matrix"] = matrix
    if matrix is not None and matrix.first_node + matrix.size > nodes:
        data["matrix"] = None
    data["curves"] = [curve for curve in cluster.curves if _fits(curve, data["levels"], bound)]
    return data


def without(cluster: Cluster, lost: frozenset[int]) -> dict[str, Any]:
    """Plain data of the cluster without some nodes, see `Cluster.without`."""
    kept = [node for node in range(cluster.nodes) if node not in lost]
    at = {node: i for i, node in enumerate(kept)}
    per_node = cluster.devices_per_node
    data = as_file(cluster) | {"nodes": len(kept)}
    islands, first = [], 0
    for island in cluster.islands:
        size = sum(node in at for node in range(first, first + island.nodes))
        if size:
            islands.append(island.model_copy(update={"nodes": size}))
        first += island.nodes
    names = {island.name for island in islands}
    data["islands"] = islands
    data["levels"] = [_over_nodes_left(level, kept, per_node) for level in data["levels"]]
    data["pairs"] = [
        pair.model_copy(update={pair.kind: ends})
        for pair in cluster.pairs
        if (ends := _moved_ends(pair, at, names, per_node))
    ]
    data["degraded"] = [
        entry.model_copy(update={"nodes": tuple(at[node] for node in entry.nodes if node in at)})
        for entry in cluster.degraded
        if any(node in at for node in entry.nodes)
    ]
    data["matrix"] = cluster.matrix and _rows_left(cluster.matrix, at)
    bound = {"devices": len(kept) * per_node, "nodes": len(kept)}
    data["curves"] = [curve for curve in cluster.curves if _fits(curve, data["levels"], bound)]
    return data


def _over_nodes_left(level: dict[str, Any], kept: Sequence[int], per_node: int) -> dict[str, Any]:
    """A level as the nodes that are left have it: of several nodes, as many as blocks of them that
    were joined before."""
    span = level["span_devices"]
    if not isinstance(span, int) or span <= per_node:
        return level
    units = [node * per_node // span for node in kept]
    fitting = [
        size
        for size in range(1, span // per_node + 1)
        if len(kept) % size == 0
        and all(len(set(units[i : i + size])) == 1 for i in range(0, len(kept), size))
    ]
    return {**level, "span_devices": per_node * max(fitting)}


def _moved_ends(
    pair: Pair, at: Mapping[int, int], islands: set[str], per_node: int
) -> tuple[Any, ...] | None:
    """The ends of an entry where nodes are renumbered; None where one is gone."""
    ends: list[Any] = []
    for end in pair.ends:
        if isinstance(end, str):
            moved: Any = end if end in islands else None
        else:
            node, slot = divmod(end, per_node) if pair.kind == "devices" else (end, 0)
            moved = at.get(node)
            if moved is not None and pair.kind == "devices":
                moved = moved * per_node + slot
        if moved is None:
            return None
        ends.append(moved)
    return tuple(ends)


def _rows_left(matrix: PairMatrix, at: Mapping[int, int]) -> PairMatrix | None:
    """The matrix without nodes that are gone; None where fewer than two are left."""
    left = [i for i in range(matrix.size) if matrix.first_node + i in at]
    if len(left) < 2:
        return None
    rows = tuple(tuple(row[j] for j in left if j < len(row)) for row in
                 (matrix.rows[i] for i in left))  # fmt: skip
    first = at[matrix.first_node + left[0]]
    return matrix.model_copy(update={"rows": rows, "first_node": first})


def _fits(curve: Curve, levels: Sequence[Mapping[str, Any]], bound: Mapping[str, int]) -> bool:
    """Whether the levels have room for the shape of a curve."""
    words = {"node": bound["devices"] // bound["nodes"]}
    inside = 1
    for level, units in zip(levels, curve.shape, strict=False):
        inside *= units
        span = level["span_devices"]
        if inside > (words.get(span, bound["devices"]) if isinstance(span, str) else span):
            return False
    return True
