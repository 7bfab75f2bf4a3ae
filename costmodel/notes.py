"""What a reader of a plan should know about the cluster it was made for: one sentence each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .links import without_noise
from .pairs import Pair, PairMatrix

if TYPE_CHECKING:
    from .cluster import Cluster

_SHOWN = 4
"""Examples that a note names before it says how many more there are."""
_RDMA = {"infiniband", "roce"}


def notes_on(cluster: Cluster) -> tuple[str, ...]:
    """Asymmetry, noise, slow links and nodes, islands that cannot talk as the file says."""
    found = _on_pairs(cluster) + _on_degraded(cluster) + _on_networks(cluster)
    if cluster.matrix is not None:
        found = _on_matrix(cluster, cluster.matrix) + found
    return tuple(found)


def _on_matrix(cluster: Cluster, matrix: PairMatrix) -> list[str]:
    _, ratio = without_noise(cluster, matrix)
    nodes = f"nodes {matrix.first_node} to {matrix.first_node + matrix.size - 1}"
    notes = []
    measured = matrix.bandwidth_bytes_per_s
    np.fill_diagonal(measured, 1.0)
    apart = np.abs(measured - measured.T) / np.maximum(measured, measured.T)
    if apart.max() > 0:
        i, j = np.unravel_index(int(apart.argmax()), apart.shape)
        notes.append(
            f"matrix: asymmetric by up to {apart.max():.1%} (nodes "
            f"{min(i, j) + matrix.first_node} and {max(i, j) + matrix.first_node})"
        )
    if matrix.noise_floor_fraction:
        notes.append(
            f"matrix: links within {matrix.noise_floor_fraction:.1%} of the median of their kind "
            "count as equal to it (noise floor of the measurement)"
        )
    slow = np.argwhere(ratio < 1 - max(matrix.noise_floor_fraction, 1e-9))
    if matrix.noise_floor_fraction and len(slow):
        symmetric = apart.max() == 0
        once = [(i, j) for i, j in slow.tolist() if i < j or not symmetric]
        worst = sorted(once, key=lambda ij: float(ratio[ij]))
        named = [
            f"{i + matrix.first_node} to {j + matrix.first_node} at {ratio[i, j]:.0%}"
            for i, j in worst
        ]
        notes.append(f"matrix: slower than the median of their kind: nodes {_listed(named)}")
    if matrix.size < cluster.nodes:
        notes.append(f"matrix: covers {nodes}; other links are as their levels say")
    return notes


def _on_pairs(cluster: Cluster) -> list[str]:
    earlier: dict[tuple[str, frozenset[int | str]], Pair] = {}
    asymmetric = []
    for pair in cluster.pairs:
        first, second = pair.ends
        back = earlier.setdefault((pair.kind, frozenset(pair.ends)), pair)
        if back is not pair and _apart(pair, back):
            asymmetric.append(f"{pair.kind} {second} and {first} by {_apart(pair, back):.1%}")
    return [f"pairs: asymmetric {_listed(asymmetric)}"] if asymmetric else []


def _apart(pair: Pair, back: Pair) -> float:
    """Difference of the two directions' bandwidths over the larger, where they compare."""
    for field in ("bandwidth_bytes_per_s", "bandwidth_fraction"):
        there, again = getattr(pair, field), getattr(back, field)
        if there is not None and again is not None:
            return float(abs(there - again) / max(there, again))
    return 0.0


def _on_degraded(cluster: Cluster) -> list[str]:
    links = [
        f"{node} at {entry.bandwidth_fraction:.0%}"
        for entry in cluster.degraded
        for node in entry.nodes
        if entry.bandwidth_fraction < 1
    ]
    compute = [
        f"{node} at {entry.compute_fraction:.0%}"
        for entry in cluster.degraded
        for node in entry.nodes
        if entry.compute_fraction < 1
    ]
    notes = []
    if links:
        notes.append(f"degraded: links of node {_listed(links)} of nominal bandwidth")
    if compute:
        notes.append(f"degraded: arithmetic of node {_listed(compute)} of its kind")
    return notes


def _on_networks(cluster: Cluster) -> list[str]:
    """RDMA of one kind does not reach the other (Holmes, 2023): such islands meet over Ethernet,
    so a link between them as fast as one inside is probably a slip."""
    inside = [i for i, level in enumerate(cluster.levels) if level.whole_island]
    notes: list[str] = []
    if not inside:
        return notes
    joint = cluster.levels[min(inside[0] + 1, len(cluster.levels) - 1)]
    for i, one in enumerate(cluster.islands):
        for j, other in enumerate(cluster.islands[:i]):
            if {one.network, other.network} != _RDMA:
                continue
            slower = min(cluster.island_levels[k][inside[0]].reached_bytes_per_s(1) for k in (i, j))
            if joint.reached_bytes_per_s(1) >= slower:
                notes.append(
                    f"islands: {other.name} ({other.network}) and {one.name} ({one.network}) share "
                    f"no RDMA, yet level {joint.name} between them is as fast as inside: expected "
                    "Ethernet"
                )
    return notes


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    shown = ", ".join(items[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown
