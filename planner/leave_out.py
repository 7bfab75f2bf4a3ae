"""Whether a job is faster without some of its nodes.

A step waits for the slowest device and the slowest link, so a node at half speed can cost more than
it brings. Nodes are slow that the cluster file calls degraded, or whose links are typically slower
than those of the others; the slowest alone and all of them together are left out in turn, and so
are islands, and what is more than a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..costmodel.cluster import Cluster
from ..ir import Infeasible, InvalidInput
from .request import Request
from .search import Search
from .solving import Outcome
from .traffic import MOST_NODES

_SLOW_LINKS = 0.9
"""Of the median node's typical bandwidth: below this a node counts as slow."""
_WORTH = 0.01
"""Gains below this are not worth telling."""


def slow_nodes(cluster: Cluster) -> tuple[int, ...]:
    """Nodes that are slower than the others of their cluster, the slowest first."""
    speed = np.ones(cluster.nodes)
    for entry in cluster.degraded:
        nodes = list(entry.nodes)
        speed[nodes] = np.minimum(speed[nodes], entry.compute_fraction * entry.bandwidth_fraction)
    if cluster.matrix is not None and 2 < cluster.nodes <= MOST_NODES:
        _, bandwidth = cluster.node_links()
        np.fill_diagonal(bandwidth, np.nan)
        typical = np.nanmedian(np.minimum(bandwidth, bandwidth.T), axis=1)
        relative = typical / np.median(typical)
        speed = np.where(relative < _SLOW_LINKS, np.minimum(speed, relative), speed)
    slow = [node for node in range(cluster.nodes) if speed[node] < 1]
    return tuple(sorted(slow, key=lambda node: (speed[node], node)))


def advice_on(request: Request, best: Outcome, anything: bool = False) -> tuple[str, ...]:
    """One line for every way of leaving nodes out that is faster than the plan on all; `anything`
    as `Search` takes it. Interrupted, it says what it has found."""
    cluster = request.hardware or request.cluster
    lines = []
    for left_out in _worth_trying(cluster):
        try:
            fewer = cluster.without(left_out)
            other = Request.on(
                request.model, fewer, request.workload, request.fix, request.runtime, request.allow
            )
            limit = (1 - _WORTH) * best.seconds
            found = Search(other, anything=anything).attempt(top=1, limit=limit)
        except (InvalidInput, Infeasible):  # the batch or the pins want all nodes
            continue
        except KeyboardInterrupt:
            break
        if found.interrupted:
            break
        for outcome in found.outcomes:  # none where the memory wants all nodes, or none is faster
            gain = 1 - outcome.seconds / best.seconds
            lines.append(
                f"without node{'s' if len(left_out) > 1 else ''} {_listed(left_out)} a step takes "
                f"{outcome.seconds:.4g} s, {gain:.1%} less: {outcome.candidate.key}"
            )
    return tuple(lines)


def _worth_trying(cluster: Cluster) -> list[tuple[int, ...]]:
    """Nodes that a job may be faster without: the slowest, all slow ones, those of an island whose
    devices or network are its own, and so many that a power of two is left, which more batches and
    models divide by."""
    slow = slow_nodes(cluster)
    found = [slow[:1], slow]
    first = 0
    for island in cluster.islands:
        found.append(tuple(range(first, first + island.nodes)))
        first += island.nodes
    two = 1 << (cluster.nodes.bit_length() - 1)
    found.append(tuple(range(two, cluster.nodes)))
    distinct = dict.fromkeys(tuple(sorted(nodes)) for nodes in found)
    return [nodes for nodes in distinct if 0 < len(nodes) < cluster.nodes]


def _listed(nodes: Sequence[int]) -> str:
    """`0, 2` or `4 to 7`."""
    if len(nodes) > 2 and nodes[-1] - nodes[0] == len(nodes) - 1:
        return f"{nodes[0]} to {nodes[-1]}"
    return ", ".join(map(str, nodes))
