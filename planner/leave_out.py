"""Whether a job is faster without its slow nodes.

A step waits for the slowest device and the slowest link, so a node at half speed can cost more than
it brings. Nodes are slow that the cluster file calls degraded, or whose links are typically slower
than those of the others; the slowest alone and all of them together are left out in turn.
"""

from __future__ import annotations

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
    """One line for every way of leaving slow nodes out that is faster than the plan on all;
    `anything` as `Search` takes it."""
    cluster = request.hardware or request.cluster
    slow = slow_nodes(cluster)
    lines = []
    for count in dict.fromkeys(n for n in (1, len(slow)) if 0 < n <= len(slow) < cluster.nodes):
        fewer = cluster.without(slow[:count])
        other = Request.on(
            request.model, fewer, request.workload, request.fix, request.runtime, request.allow
        )
        try:
            found = Search(other, anything=anything).attempt(top=1, limit=best.seconds)
        except (InvalidInput, Infeasible):  # the batch or the pins want all nodes
            continue
        if not found.outcomes:  # the memory does, or nothing is faster
            continue
        outcome = found.outcomes[0]
        gain = 1 - outcome.seconds / best.seconds
        if gain > _WORTH:
            nodes = ", ".join(map(str, sorted(slow[:count])))
            lines.append(
                f"without node{'s' if count > 1 else ''} {nodes} a step takes "
                f"{outcome.seconds:.4g} s, {gain:.1%} less: {outcome.candidate.key}"
            )
    return tuple(lines)
