"""Links as captures show them, a job between nodes, and simulated annealing as a peer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardwright.planner.mapping import Flow, flow_seconds

Array = NDArray[np.float64]


def measured_links(nodes: int, seed: int, slow: float = 0.1, noise: float = 0.02) -> Array:
    """Slownesses as pairwise captures look: 2 % of noise, a tenth of the links degraded."""
    rng = np.random.default_rng(seed)
    rate = 1 + noise * rng.standard_normal((nodes, nodes))
    degraded = rng.random((nodes, nodes)) < slow
    rate = np.where(degraded, rate * rng.uniform(0.3, 0.8, (nodes, nodes)), rate)
    found = 1 / np.minimum(rate, rate.T)
    np.fill_diagonal(found, 0.0)
    return found


def job(pp: int, dp: int) -> list[Flow]:
    """Rings of data-parallel nodes, and what stages hand on: both matter."""
    rings = np.array([(s * dp + d, s * dp + (d + 1) % dp) for s in range(pp) for d in range(dp)])
    flows = [Flow("data", rings, np.full(len(rings), 0.05))] if dp > 1 else []
    for s in range(pp - 1):
        ends = np.array([(s * dp + d, (s + 1) * dp + d) for d in range(dp)])
        flows.append(Flow(f"boundary {s}", ends, np.full(dp, 0.01)))
    return flows


def cost(flows: Sequence[Flow], node_of: Sequence[int], slowness: Array) -> float:
    """The sum over flows of their worst links."""
    return sum(float(flow_seconds(flow, node_of, slowness).max()) for flow in flows)


def annealed(flows: Sequence[Flow], slowness: Array, seconds: float) -> float:
    """Simulated annealing over exchanges of two nodes, restarted when it has cooled down."""
    rng = np.random.default_rng(1)
    nodes, began, best = len(slowness), time.process_time(), np.inf
    while time.process_time() - began < seconds:
        where = rng.permutation(nodes)
        now = cost(flows, where, slowness)
        for temperature in np.geomspace(0.03 * now, 1e-5 * now, 8000):
            i, k = rng.integers(nodes, size=2)
            where[[i, k]] = where[[k, i]]
            other = cost(flows, where, slowness)
            if other <= now or rng.random() < np.exp((now - other) / temperature):
                now = other
            else:
                where[[i, k]] = where[[k, i]]
            best = min(best, now)
        if time.process_time() - began >= seconds:
            break
    return float(best)
