"""Bandwidth between all pairs, measured once or more: what is of the links, what is of chance.

Each pair gets the mean over both directions and all captures. The disagreement within pairs, and
what the order of measuring may have left in the means (`ring_order`), give the noise floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InvalidInput
from ..cluster import Cluster
from ..links import without_noise
from ..pairs import Pair, PairMatrix
from .ring_order import NORMAL_MAD, order_effect

_FALSE_ALARMS = 0.05
"""Chance that any of all pairs of equal links goes beyond the noise floor."""


@dataclass(frozen=True, eq=False)
class MeasuredPairs:
    """Bandwidth between all pairs of nodes.

    `bandwidth_bytes_per_s` is (nodes, nodes), symmetric, infinite on the diagonal.
    `noise_floor_fraction` is the difference from the median that chance explains;
    `asymmetry_fraction` the largest difference between the two directions of a pair, over the
    larger; `order_fraction` the share of the spread that the order of measuring explains.
    """

    nodes: tuple[str, ...]
    bandwidth_bytes_per_s: NDArray[np.float64]
    noise_floor_fraction: float
    asymmetry_fraction: float
    order_fraction: float
    source: str
    notes: tuple[str, ...]

    def matrix(self, first_node: int = 0) -> PairMatrix:
        """For `Cluster.with_pairs`: the nodes from `first_node` on, in this order."""
        return PairMatrix.of(
            self.bandwidth_bytes_per_s, self.noise_floor_fraction, first_node, self.source
        )


def symmetrised(
    captures: Sequence[NDArray[np.float64]],
    nodes: Sequence[str],
    source: str = "",
    assumed_noise_fraction: float = 0.05,
) -> MeasuredPairs:
    """One matrix of several captures (nodes, nodes) in bytes/s, from row to column.

    The diagonal is not read. Where no pair was measured twice (one capture, equal both ways) the
    noise cannot be told and `assumed_noise_fraction` is its floor. Raises InvalidInput without a
    capture, or for one that is not square, not of these nodes or not positive.
    """
    size = len(nodes)
    if not captures or size < 2:
        raise InvalidInput(f"{source or 'pairs'}: expected a matrix of at least 2 nodes")
    stack = np.array([np.array(capture, dtype=float) for capture in captures])
    if stack.shape[1:] != (size, size):
        raise InvalidInput(
            f"{source or 'pairs'}: matrix of {stack.shape[1:]}, expected {size} x {size}"
        )
    off = ~np.eye(size, dtype=bool)
    if not (np.isfinite(stack[:, off]).all() and (stack[:, off] > 0).all()):
        raise InvalidInput(f"{source or 'pairs'}: expected a bandwidth above 0 for every pair")
    stack[:, ~off] = 1.0
    found = [order_effect(capture) for capture in stack]
    order = float(np.mean([share for _, share in found]))
    there, back = _pairs_of(stack)
    mean = (there + back).mean(axis=0) / 2
    apart = np.abs(there - back) / np.maximum(there, back)
    without_order = np.log(stack) - np.array([effect for effect, _ in found])
    measurements = np.concatenate(_pairs_of(without_order))
    known = bool((measurements != measurements[0]).any())
    floor = _chance(measurements) + _left_of_order([effect for effect, _ in found])
    floor = min(floor, 0.99) if known else assumed_noise_fraction
    whole = np.full((size, size), np.inf)
    upper = np.triu_indices(size, 1)
    whole[upper] = whole[upper[::-1]] = mean
    return MeasuredPairs(
        nodes=tuple(nodes),
        bandwidth_bytes_per_s=whole,
        noise_floor_fraction=floor,
        asymmetry_fraction=float(apart.max()),
        order_fraction=order,
        source=source,
        notes=_notes(float(apart.max()), known, floor, order),
    )


def standing_out(cluster: Cluster, matrix: PairMatrix) -> tuple[Pair, ...]:
    """The pairs of a matrix that differ from others of their kind beyond its noise floor.

    For `Cluster.with_pairs` of clusters whose whole matrix would be too large a file: what is left
    out has the bandwidth of its level.
    """
    bandwidth, ratio = without_noise(cluster, matrix)
    odd = np.abs(ratio - 1) > matrix.noise_floor_fraction
    symmetric = bool((bandwidth == bandwidth.T).all())
    return tuple(
        Pair(
            nodes=(int(i) + matrix.first_node, int(j) + matrix.first_node),
            bandwidth_bytes_per_s=float(bandwidth[i, j]),
        )
        for i, j in np.argwhere(odd)
        if i < j or not symmetric
    )


def _pairs_of(stack: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(captures, pairs) of each direction."""
    first, second = np.triu_indices(stack.shape[1], 1)
    return stack[:, first, second], stack[:, second, first]


def _chance(measurements: NDArray[np.float64]) -> float:
    """How far from the others' the mean of a pair may lie by chance, as a fraction.

    `measurements` is (repeats, pairs), logarithms. The spread of one comes from the median
    deviation within pairs (a few bad links must not hide themselves), that of a mean of k is 1/√k
    of it, and all pairs together may cross the floor with `_FALSE_ALARMS` (Bonferroni).
    """
    count, pairs = measurements.shape
    deviation = np.abs(measurements - measurements.mean(axis=0))
    single = NORMAL_MAD * float(np.median(deviation)) * (count / (count - 1)) ** 0.5
    beyond = NormalDist().inv_cdf(1 - _FALSE_ALARMS / (2 * pairs))
    return float(np.expm1(beyond * single / count**0.5))


def _left_of_order(effects: Sequence[NDArray[np.float64]]) -> float:
    """What the mean over directions and captures keeps of the order of measuring, at most.

    It may be of the links after all (neighbours in a rack), so it is not subtracted.
    """
    mean = np.mean([(effect + effect.T) / 2 for effect in effects], axis=0)
    kept = mean[np.triu_indices(len(mean), 1)]
    return float(np.expm1(np.abs(kept - np.median(kept)).max()))


def _notes(asymmetry: float, known: bool, floor: float, order: float) -> tuple[str, ...]:
    if not known:
        return (
            f"every pair was measured once or came out equal both ways: the noise is not known, "
            f"differences within {floor:.1%} are taken for chance",
        )
    notes = [
        f"the two directions of a pair differ by up to {asymmetry:.1%}; their mean is kept",
        f"differences within {floor:.1%} are chance (noise floor)",
    ]
    if order > 0:
        notes.append(
            f"{order:.0%} of the spread between links is the order in which they were measured: "
            "measure in random order, repeatedly"
        )
    return tuple(notes)
