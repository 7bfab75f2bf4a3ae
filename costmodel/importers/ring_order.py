"""How much of a matrix of bandwidths is the order in which its pairs were measured.

Tools walk a ring of the nodes: at step d every node sends to the one d places on (mpiGraph.c). What
drifts or warms up meanwhile then looks like links. A link itself is as fast in both directions, or
nearly; d steps one way are n - d steps the other, so an effect of d that is odd betrays the order.
The ring is the list of the nodes or, where that was sorted afterwards, one that the first or the
last step gives away: it stands out in every row (the project's two 16-node captures: about 95 % of
their spread along that ring, 48 % along the list).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FEWEST = 6
"""Nodes below which there are too few distances to tell an effect from chance."""
_EVIDENCE = 40.0
"""F ratio of the odd effect from which it is believed. A ring that is chosen for its extremes among
nothing but noise reached at most 44 of 8 nodes, 16 of 16 and 9 of 48 (200 trials each); the
project's captures have more than 700."""
NORMAL_MAD = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution."""

_Matrix = NDArray[np.float64]


def order_effect(capture: _Matrix) -> tuple[_Matrix, float]:
    """The part of a capture (nodes, nodes) that its order explains, and its share of the variance.

    The first is (nodes, nodes), of the logarithm of the bandwidth; zero where no order shows.
    """
    size = len(capture)
    none = np.zeros((size, size))
    if size < _FEWEST:
        return none, 0.0
    logs = np.log(np.where(np.eye(size, dtype=bool), np.nan, capture))
    # Nodes that are slow as such say nothing of the order.
    centred = logs - np.nanmedian(logs, axis=1, keepdims=True)
    centred -= np.nanmedian(centred, axis=0, keepdims=True)
    found = [_along(centred, ring) for ring in _rings(centred)]
    evidence, share, effect = max(found, key=lambda one: one[0])
    return (effect, share) if evidence > _EVIDENCE else (none, 0.0)


def _rings(centred: _Matrix) -> list[NDArray[np.int64]]:
    size = len(centred)
    rings = [np.arange(size)]
    for extremes in (np.nanmin(centred, axis=1), np.nanmax(centred, axis=1)):
        # The typical extreme: in the row of a bad link the extreme is that link.
        ring = _followed(_neighbours(np.abs(centred - np.median(extremes))))
        if ring is not None:
            rings.append(ring)
    return rings


def _neighbours(away: _Matrix) -> NDArray[np.int64]:
    """A column for each row, the closest first: a bad link costs no other row its own."""
    size = len(away)
    neighbours = np.full(size, -1)
    taken = np.zeros(size, dtype=bool)
    for flat in np.argsort(np.where(np.isnan(away), np.inf, away), axis=None, kind="stable"):
        row, column = divmod(int(flat), size)
        if neighbours[row] < 0 and not taken[column]:
            neighbours[row] = column
            taken[column] = True
    return neighbours


def _followed(neighbours: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The nodes in the order that following each one's neighbour visits them, if it visits all."""
    ring = [0]
    while (following := int(neighbours[ring[-1]])) != 0:
        if following in ring:
            return None
        ring.append(following)
    return np.array(ring) if len(ring) == len(neighbours) else None


def _along(centred: _Matrix, ring: NDArray[np.int64]) -> tuple[float, float, _Matrix]:
    """F ratio of the odd effect of the distance along a ring, share of the whole effect, effect."""
    size = len(ring)
    place = np.empty(size, dtype=np.int64)
    place[ring] = np.arange(size)
    distance = (place[None, :] - place[:, None]) % size
    by_distance = np.zeros(size)
    for d in range(1, size):
        by_distance[d] = np.median(centred[distance == d])  # a bad link must not count as order
    odd = (by_distance - by_distance[-np.arange(size)]) / 2
    off = distance > 0
    values = centred[off]
    effect = by_distance[distance]
    freedom = (size - 1) // 2
    explained = float((odd[distance[off]] ** 2).sum()) / freedom
    rest = values - effect[off]
    left = float((rest**2).sum()) / (len(values) - size + 1)
    total = float(((values - values.mean()) ** 2).sum()) / (len(values) - 1)
    chance = max((NORMAL_MAD * float(np.median(np.abs(rest)))) ** 2, 1e-12)
    return explained / chance, max(0.0, 1 - left / total) if total else 0.0, effect
