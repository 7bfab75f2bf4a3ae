"""Mapping: which physical node takes which place of a job, from the links between nodes.

A *place* is a run of as many ranks as a node has devices. What a job sends between places is a set
of `Flow`s; each waits for its slowest link, and the flows of a step follow one another, so a
mapping takes the sum over flows of its worst link. Up to `EXACT_NODES` nodes that is minimised by
CP-SAT: one-hot `x[place, node]`, and per flow a ladder of rungs, `z[flow, v]` where it takes at
least `v` seconds: a link i, j that is so slow asks `x[a, i] + x[b, j] <= 1 + z`. Larger clusters,
and the start of the exact search, go by exchanging places (the method of Pipette, Yim et al.,
DATE 2024). A bound comes with every mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import numpy as np
from numpy.typing import NDArray

from ..ir import InvalidInput
from ..ir.plan import NodeMapping
from .linear_program import LinearProgram

Array = NDArray[np.float64]
Ints = NDArray[np.intp]

EXACT_NODES = 16
"""Nodes up to which the exact program is tried."""
_EVERY_ORDER = 7
"""Nodes up to which all permutations are priced: 5,040 take milliseconds."""
_EXACT_EFFORT = 1.0
"""CP-SAT's deterministic time, about seconds; what is not proved by then carries its bound."""
_RESTARTS, _RESTARTS_OF_LARGE, _LARGE = 16, 2, 64
"""Starts of the exchanges, and those on clusters of more than `_LARGE` nodes."""
_STEPS = 2000
_TRIED = 32
"""Exchanges that one step of annealing looks at; the temperature falls over `_STEPS`."""
_MOST_EDGES = 150_000_000
"""Edges that one descent prices, a few seconds."""
_NORM = 8
"""The sum of worst edges is flat almost everywhere; annealing follows norms of this order."""
_WORTH = 1e-9
"""Of the cost: smaller gains are rounding."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """What waits for the slowest of some links: `ends` are places (edges, 2), `seconds` what an
    edge takes in a step on a link of slowness 1 (edges,)."""

    name: str
    ends: Ints
    seconds: Array


def map_places(flows: Sequence[Flow], places: int, slowness: Array, seed: int = 0) -> NodeMapping:
    """The best mapping found of `places` onto as many nodes or more, the same for the same seed.

    `slowness` (nodes, nodes) says how much longer a link takes than the one that flows are given
    for; of two directions the worse counts. Raises InvalidInput for more places than nodes, and
    for ends that are no places.
    """
    nodes = len(slowness)
    if places > nodes:
        raise InvalidInput(f"{places} places: expected at most the cluster's {nodes} nodes")
    for flow in flows:
        if flow.ends.size and not 0 <= flow.ends.min() <= flow.ends.max() < places:
            raise InvalidInput(f"flow {flow.name}: expected ends from 0 to {places - 1}")
    costs = _Costs.of(flows, np.maximum(slowness, slowness.T))
    in_order = np.arange(nodes)
    if not len(costs.ends):
        return NodeMapping(tuple(range(places)), 0.0, 0.0, 0.0)
    best = _exchanged(costs, in_order, seed)
    bound = float(costs.bounds().sum())
    if nodes <= _EVERY_ORDER:
        best = _best_order(costs, nodes)
        bound = float(costs.seconds(best))
    elif nodes <= EXACT_NODES and costs.seconds(best) > bound * (1 + _WORTH):
        best, proved = _exact(costs, places, best, seed)
        bound = max(bound, proved)
    seconds, unmapped = float(costs.seconds(best)), float(costs.seconds(in_order))
    if unmapped <= seconds * (1 + _WORTH):
        best, seconds = in_order, unmapped
    node_of = tuple(int(node) for node in best[:places])
    return NodeMapping(node_of, seconds, unmapped, min(bound, seconds))


def flow_seconds(flow: Flow, node_of: Sequence[int], slowness: Array) -> Array:
    """(edges,): what every edge of a flow takes under a mapping; nothing within a place."""
    where = np.asarray(node_of, np.intp)
    each = np.maximum(slowness, slowness.T)[where[flow.ends[:, 0]], where[flow.ends[:, 1]]]
    found: Array = np.where(flow.ends[:, 0] == flow.ends[:, 1], 0.0, flow.seconds * each)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Costs:
    """Flows as arrays, the edges of all in a row and those within a place left out.

    Edge e takes `weight[e]` times the slowness of its link; those of flow f are `first[f]` to
    `first[f + 1]`. A permutation of all nodes says where places go; what is beyond the places is
    spare.
    """

    slowness: Array
    ends: Ints
    weight: Array
    first: Ints

    @staticmethod
    def of(flows: Sequence[Flow], slowness: Array) -> _Costs:
        ends, weights, first = [np.empty((0, 2), np.intp)], [np.empty(0)], [0]
        for flow in flows:
            away = (flow.ends[:, 0] != flow.ends[:, 1]) & (flow.seconds > 0)
            if away.any():
                heaviest: dict[tuple[int, int], float] = {}
                for (a, b), weight in zip(
                    np.sort(flow.ends[away], axis=1).tolist(),
                    flow.seconds[away].tolist(),
                    strict=True,
                ):
                    heaviest[a, b] = max(weight, heaviest.get((a, b), 0.0))
                ends.append(np.array(list(heaviest), np.intp))
                weights.append(np.array(list(heaviest.values())))
                first.append(first[-1] + len(heaviest))
        return _Costs(slowness, np.concatenate(ends), np.concatenate(weights), np.array(first))

    def edges(self, where: Ints) -> Array:
        """(..., edges): seconds of every edge under permutations (..., nodes)."""
        links = self.slowness[where[..., self.ends[:, 0]], where[..., self.ends[:, 1]]]
        found: Array = self.weight * links
        return found

    def seconds(self, where: Ints) -> Array:
        """(...): the sum over flows of their worst edges."""
        worst = np.maximum.reduceat(self.edges(where), self.first[:-1], axis=-1)
        found: Array = worst.sum(axis=-1)
        return found

    def smooth(self, where: Ints, unit: float) -> Array:
        """(...): a stand-in for `seconds` that feels every edge; `unit` is their size."""
        powers = (self.edges(where) / unit) ** _NORM
        sums = np.add.reduceat(powers, self.first[:-1], axis=-1)
        found: Array = unit * (sums ** (1 / _NORM)).sum(axis=-1)
        return found

    def bounds(self) -> Array:
        """(flows,): below every mapping. Different edges take different links: of the k edges of a
        flow that weigh most, one gets no faster link than the k-th fastest."""
        links = np.sort(self.slowness[np.triu_indices(len(self.slowness), 1)])
        least = []
        for first, last in pairwise(self.first.tolist()):
            heaviest = np.sort(self.weight[first:last])[::-1]
            least.append(float((heaviest * links[: last - first]).max()))
        return np.array(least)


def _exchanged(costs: _Costs, start: Ints, seed: int) -> Ints:
    """Annealing over exchanges of two nodes from several starts, each followed by descent."""
    rng = np.random.default_rng(seed)
    best, least = start, float(costs.seconds(start))
    for restart in range(_RESTARTS if len(start) <= _LARGE else _RESTARTS_OF_LARGE):
        where = start if restart == 0 else rng.permutation(start)
        where = _descended(costs, _annealed(costs, where, rng))
        seconds = float(costs.seconds(where))
        if seconds < least * (1 - _WORTH):
            best, least = where, seconds
    return best


def _annealed(costs: _Costs, where: Ints, rng: np.random.Generator) -> Ints:
    """Of `_TRIED` random exchanges at a time one, or none, is drawn by its Boltzmann weight."""
    nodes, unit, rows = len(where), float(costs.seconds(where)), np.arange(_TRIED)
    now = float(costs.smooth(where, unit))
    for temperature in unit * np.geomspace(0.05, 1e-4, _STEPS):
        left, right = rng.integers(nodes, size=(2, _TRIED))
        others = np.repeat(where[None, :], _TRIED, axis=0)
        others[rows, left], others[rows, right] = where[right], where[left]
        smooth = costs.smooth(others, unit)
        weights = np.exp(-np.maximum(smooth - now, -50 * temperature) / temperature)
        picked = int(np.searchsorted(np.cumsum(weights), rng.random() * (1.0 + weights.sum())))
        if picked < _TRIED:
            where, now = others[picked], float(smooth[picked])
    return where


def _descended(costs: _Costs, where: Ints) -> Ints:
    """Exchanges of a place at the worst edge of a flow with any other, while one gains; on clusters
    so large that this takes long, up to `_MOST_EDGES` looked at."""
    rows = np.arange(len(where))
    now = float(costs.seconds(where))
    left = _MOST_EDGES // (len(rows) * len(costs.ends))
    gained = True
    while gained and left > 0:
        gained = False
        taken = costs.edges(where)
        worst = [
            first + int(taken[first:last].argmax())
            for first, last in pairwise(costs.first.tolist())
        ]
        for place in dict.fromkeys(costs.ends[worst].ravel().tolist()):
            others = np.repeat(where[None, :], len(where), axis=0)
            others[rows, place], others[rows, rows] = where, where[place]
            seconds = costs.seconds(others)
            at, left = int(seconds.argmin()), left - 1
            if seconds[at] < now * (1 - _WORTH):
                now, where, gained = float(seconds[at]), others[at], True
                break
    return where


def _best_order(costs: _Costs, nodes: int) -> Ints:
    """The best of all permutations."""
    every = np.array(list(permutations(range(nodes))), np.intp)
    found: Ints = every[int(np.argmin(costs.seconds(every)))]
    return found


def _exact(costs: _Costs, places: int, start: Ints, seed: int) -> tuple[Ints, float]:
    """The best permutation that CP-SAT finds within its effort, and its bound in seconds."""
    nodes, program = len(start), LinearProgram()
    at = np.array([[program.variable(integer=True) for _ in range(nodes)] for _ in range(places)])
    for place in at.tolist():
        program.row([(v, 1.0) for v in place], 1.0, 1.0)
    for node in at.T.tolist():
        program.row([(v, 1.0) for v in node], 0.0, 1.0)
    hint = np.zeros(at.size)
    hint[at[np.arange(places), start[:places]]] = 1.0
    least, taken = costs.bounds(), costs.edges(start)
    slack = float(costs.seconds(start)) - float(least.sum())
    for flow, (first, last) in enumerate(pairwise(costs.first.tolist())):
        # a flow that took more than this would make the whole worse than the start
        base, most = float(least[flow]), float(least[flow]) + slack * (1 + _WORTH)
        tables = costs.weight[first:last, None, None] * costs.slowness
        rungs = np.unique(tables[(tables > base) & (tables <= most)])
        ladder = [
            program.variable(float(step), integer=True) for step in np.diff(rungs, prepend=base)
        ]
        hint = np.append(hint, rungs <= taken[first:last].max())
        for below, above in pairwise(ladder):
            program.row([(below, 1.0), (above, -1.0)], 0.0, 1.0)
        for (a, b), table in zip(costs.ends[first:last].tolist(), tables, strict=True):
            for i in range(nodes):
                for value in np.unique(table[i][table[i] > base]).tolist():
                    slow = np.flatnonzero(table[i] >= value).tolist()
                    terms = [(int(at[b, j]), 1.0) for j in slow] + [(int(at[a, i]), 1.0)]
                    if value <= most:
                        terms.append((ladder[int(np.searchsorted(rungs, value))], -1.0))
                    program.row(terms, float("-inf"), 1.0)
                    if value > most:
                        break
    found = program.search(hint, _EXACT_EFFORT, seed)
    if found is None:
        return start, float(least.sum())
    chosen = found.values[: at.size].reshape(at.shape).argmax(axis=1)
    spare = [node for node in start.tolist() if node not in set(chosen.tolist())]
    return np.concatenate([chosen, spare]).astype(np.intp), float(least.sum()) + found.bound
