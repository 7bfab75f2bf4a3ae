"""Which choice of each layer of a stage: what seconds, parameters and memory can be traded for.

A *frontier* holds what the layers of a stage can take together, one column for each selection that
no other beats: seconds, resync seconds, bytes in flight, fixed bytes. At d replicas a column takes
`seconds / d + resync · (1 - 1/d)`, and with y microbatches in flight `in_flight · y + fixed` bytes.
Both are straight lines, in 1/d and in y, so that what is no worse at either end of their range is
no worse anywhere. Where frontiers would grow without end, neighbours are joined into one that is as
good as each: then they are a bound, and `fastest_picks` says what is true of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .downsets import Array, Bools
from .stage_intervals import Intervals
from .stage_problem import Choice, StageProblem, layer_seconds

MOST_COLUMNS = 256
"""Columns of a frontier above which neighbours are joined."""
_BLOCK = 512
"""Columns that are compared with each other at a time."""
_SAME = 1 + 1e-14
"""Seconds of equal layers are summed in any order."""


class Frontiers:
    """The frontiers of stages; those of fewer layers are kept for those of more.

    `most_replicas` and `most_in_flight` end the ranges of d and y. Columns that need more memory
    than there is, or more seconds than `worth_s`, are left out.
    """

    def __init__(
        self, intervals: Intervals, most_replicas: int, most_in_flight: int, worth_s: float
    ) -> None:
        self.intervals, self.problem = intervals, intervals.problem
        self.most_replicas, self.most_in_flight = most_replicas, most_in_flight
        self.worth_s = worth_s
        self._frontiers: dict[tuple[int, int, int], Array] = {}
        self._layers: dict[tuple[int, int, int, int], Array] = {}
        place = {layer: at for at, layer in enumerate(intervals.downsets.order)}
        # By degree and place: the other ends of edges whose sync bytes depend on what is chosen.
        self._into: dict[int, list[int]] = {}
        self._out: dict[int, list[int]] = {}
        for degree in map(int, np.unique(intervals.degree)):
            self._into[degree], self._out[degree] = [0] * len(place), [0] * len(place)
            for edge in self.problem.edges:
                source, target = place[edge.source], place[edge.target]
                if _more_sync(self._choices(degree, target), edge.source, "in").any():
                    self._into[degree][target] |= 1 << source
                if _more_sync(self._choices(degree, source), edge.target, "out").any():
                    self._out[degree][source] |= 1 << target

    def of(self, row: int) -> Array:
        """The frontier of a stage [4, columns]."""
        intervals, masks = self.intervals, self.intervals.downsets.masks
        degree, settled = int(intervals.degree[row]), intervals.mask(row)
        before, after = masks[intervals.first[row]], masks[-1] & ~masks[intervals.last[row]]
        ends = []
        for at, targets in enumerate(self._out[degree]):
            if targets & after and settled >> at & 1:
                settled &= ~(1 << at)
                ends.append(self._layer(degree, at, before, targets & after))
        found = self._of_layers(degree, settled, before)
        for own in ends:
            found = self._joined(found, own)
        return found

    def _of_layers(self, degree: int, layers: int, before: int) -> Array:
        """The frontier of layers that send nothing beyond whose bytes depend on what is chosen."""
        if not layers:
            return np.zeros((4, 1))
        depends = any(
            sources & before and layers >> at & 1 for at, sources in enumerate(self._into[degree])
        )
        key = (degree, layers, before if depends else 0)
        if key not in self._frontiers:
            at = layers.bit_length() - 1
            rest = self._of_layers(degree, layers & ~(1 << at), before)
            own = self._layer(degree, at, before, 0)
            self._frontiers[key] = self._joined(rest, own)
        return self._frontiers[key]

    def _choices(self, degree: int, at: int) -> Sequence[Choice]:
        return self.problem.layers[self.intervals.downsets.order[at]].choices.get(degree, ())

    def _layer(self, degree: int, at: int, before: int, targets: int) -> Array:
        """The choices of one layer; their sync bytes beyond the least are part of its seconds."""
        sources = self._into[degree][at] & before
        key = (degree, at, sources, targets)
        if key in self._layers:
            return self._layers[key]
        problem, order = self.problem, self.intervals.downsets.order
        choices, sent = self._choices(degree, at), np.zeros(len(self._choices(degree, at)))
        place = {layer: i for i, layer in enumerate(order)}
        for edge in problem.edges:
            if edge.target == order[at] and sources >> place[edge.source] & 1:
                sent += _more_sync(choices, edge.source, "in")
            if edge.source == order[at] and targets >> place[edge.target] & 1:
                sent += _more_sync(choices, edge.target, "out")
        rate = problem.bandwidth_bytes_per_s
        columns = np.array([
            [c.seconds_per_sample, 4 * c.parameter_bytes / problem.microbatches / rate,
             c.in_flight_bytes, c.fixed_bytes] for c in choices
        ]).T  # fmt: skip
        columns[0] += 2 * sent / rate
        self._layers[key] = self._unbeaten(columns)
        return self._layers[key]

    def _joined(self, one: Array, other: Array) -> Array:
        """The frontier of the layers of both."""
        every = (one[:, :, None] + other[:, None, :]).reshape(4, -1)
        return self._unbeaten(every)

    def _unbeaten(self, columns: Array) -> Array:
        seconds, resync, alive, fixed = columns
        ends = np.stack([
            seconds, seconds / self.most_replicas + resync * (1 - 1 / self.most_replicas),
            alive + fixed, alive * self.most_in_flight + fixed,
        ])  # fmt: skip
        use = ends[2] <= self.problem.memory_limit_bytes
        use &= np.minimum(ends[0], ends[1]) <= self.worth_s * _SAME
        order = np.nonzero(use)[0]
        order = order[np.lexsort(ends[::-1, order])]
        kept = order[:0]
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK]
            own, others = ends[:, block], ends[:, kept]
            beaten = np.triu(_no_worse(own, own), 1).any(axis=0)
            beaten |= _no_worse(others, own).any(axis=0)
            kept = np.append(kept, block[~beaten])
        return _thinned(columns[:, kept])


def _more_sync(choices: Sequence[Choice], other: int, way: str) -> Array:
    """Per choice, the sync bytes of an edge beyond the least of any choice."""
    name = f"sync_{way}_bytes"
    sent = np.array([getattr(choice, name).get(other, 0.0) for choice in choices])
    return sent - sent.min() if len(sent) else sent


def _no_worse(one: Array, other: Array) -> Bools:
    """[i, j]: whether column i of one is at most column j of the other in every row."""
    found: Bools = one[0][:, None] <= other[0] * _SAME
    found &= one[1][:, None] <= other[1] * _SAME
    for row in (2, 3):
        found &= one[row][:, None] <= other[row]
    return found


def _thinned(columns: Array) -> Array:
    """At most `MOST_COLUMNS`, by taking the least of neighbours in order of seconds."""
    if columns.shape[1] <= MOST_COLUMNS:
        return columns
    begins = np.linspace(0, columns.shape[1], MOST_COLUMNS, endpoint=False).astype(np.intp)
    return np.minimum.reduceat(columns, begins, axis=1)


def fastest_picks(
    problem: StageProblem, layers: Sequence[int], degree: int, replicas: int, in_flight: int
) -> tuple[int, ...] | None:
    """The choice of each layer with which a stage is fastest in its memory; None where none fits.

    Exact: selections of the layers so far, of which none beats another in both seconds and bytes.
    """
    inside, seconds, held = frozenset(layers), [], []
    for layer in layers:
        choices = problem.layers[layer].choices[degree]
        seconds.append(np.array([
            layer_seconds(problem, inside, layer, choice, replicas) for choice in choices
        ]))  # fmt: skip
        held.append(np.array([c.in_flight_bytes * in_flight + c.fixed_bytes for c in choices]))
    rest = np.append(np.cumsum([each.min() for each in held][::-1])[::-1], 0.0)
    took, bytes_, steps = np.zeros(1), np.zeros(1), []
    for at, (more_s, more_bytes) in enumerate(zip(seconds, held, strict=True)):
        total_s = (took[:, None] + more_s).ravel()
        total_bytes = (bytes_[:, None] + more_bytes).ravel()
        fits = np.nonzero(total_bytes + rest[at + 1] <= problem.memory_limit_bytes)[0]
        order = fits[np.lexsort((total_bytes[fits], total_s[fits]))]
        less = np.minimum.accumulate(total_bytes[order])
        order = order[np.append(True, less[1:] < less[:-1])[: len(order)]]
        if not len(order):
            return None
        steps.append(np.divmod(order, len(more_s)))
        took, bytes_ = total_s[order], total_bytes[order]
    picks, at = [], 0
    for before, pick in reversed(steps):
        picks.append(int(pick[at]))
        at = before[at]
    return tuple(reversed(picks))
