"""Every stage that there could be, an interval of downsets at a degree, with its sums.

Sums over the layers of an interval are differences of sums over downsets, and so are those over
its cut edges: those into a stage are all that leave the smaller downset, less those whose target
comes later still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from .downsets import Array, Downsets, Ints
from .stage_problem import Choice, StageProblem


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Row g: the stage of layers between downsets `first[g]` and `last[g]` at `degree[g]`.

    `cut_seconds`: what its cut edges take per sample, each with the least sync bytes of any choice.
    """

    problem: StageProblem
    downsets: Downsets
    first: Ints
    last: Ints
    degree: Ints
    cut_seconds: Array

    @staticmethod
    def of(problem: StageProblem, downsets: Downsets) -> Intervals:
        """All that have no layer without the degree, and no degree above the devices."""
        parts = []
        degrees = {t for layer in problem.layers for t in layer.choices if t <= problem.devices}
        for degree in sorted(degrees):
            lacking = np.array([degree not in x.choices for x in problem.layers], np.intp)
            lacks = downsets.members @ lacking
            known = lacks[downsets.first] == lacks[downsets.last]
            first, last = downsets.first[known], downsets.last[known]
            cut = _cut_seconds(problem, downsets, degree)[first, last]
            parts.append((first, last, np.full(len(first), degree), cut))
        if not parts:
            none = np.zeros(0, np.intp)
            return Intervals(problem, downsets, none, none, none, np.zeros(0))
        columns = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Intervals(problem, downsets, *columns)

    def __len__(self) -> int:
        return len(self.first)

    def only(self, rows: Ints) -> Self:
        """Those rows alone."""
        return type(self)(
            self.problem, self.downsets, self.first[rows], self.last[rows], self.degree[rows],
            self.cut_seconds[rows],
        )  # fmt: skip

    def mask(self, row: int) -> int:
        """The layers of a stage, as bits (`Downsets.masks`)."""
        masks = self.downsets.masks
        return masks[int(self.last[row])] & ~masks[int(self.first[row])]

    def layers(self, row: int) -> tuple[int, ...]:
        """The layers of a stage."""
        return self.downsets.layers_of(self.mask(row))

    def sums(self, amount: Callable[[Sequence[Choice]], float]) -> Array:
        """The sum over a stage's layers of what an amount of a layer's choices at the degree is."""
        found = np.zeros(len(self))
        for degree in np.unique(self.degree):
            at = self.degree == degree
            every = [x.choices.get(int(degree), ()) for x in self.problem.layers]
            through = self.downsets.members @ np.array([amount(x) if x else 0.0 for x in every])
            found[at] = through[self.last[at]] - through[self.first[at]]
        return found

    def most_in_flight(self, limit_bytes: float, most: int) -> Ints:
        """The most microbatches, up to `most`, of which some choices fit the limit; 0 where not one
        does."""
        low, high = np.zeros(len(self), np.intp), np.full(len(self), most)
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = self._least_bytes(middle) <= limit_bytes
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return low

    def _least_bytes(self, in_flight: Ints) -> Array:
        """The least bytes of a device with so many microbatches in flight."""
        found = np.zeros(len(self))
        for degree in np.unique(self.degree):
            at = np.nonzero(self.degree == degree)[0]
            inside = self.downsets.members[self.last[at]] & ~self.downsets.members[self.first[at]]
            for v, layer in enumerate(self.problem.layers):
                own = at[inside[:, v]]
                if len(own):
                    each = [
                        c.in_flight_bytes * in_flight[own] + c.fixed_bytes
                        for c in layer.choices[int(degree)]
                    ]
                    found[own] += np.min(each, axis=0)
        return found


def _cut_seconds(problem: StageProblem, downsets: Downsets, degree: int) -> Array:
    """[smaller downset, larger]: the seconds of the edges into and out of what is between."""
    if not problem.edges:
        return np.zeros((len(downsets.masks),) * 2)
    source = downsets.members[:, [e.source for e in problem.edges]].astype(np.float64)
    absent = 1.0 - downsets.members[:, [e.target for e in problem.edges]]

    def least(layer: int, name: str, other: int) -> float:
        choices = problem.layers[layer].choices.get(degree, ())
        return min((getattr(c, name).get(other, 0.0) for c in choices), default=0.0)

    into = np.array([e.bytes + least(e.target, "sync_in_bytes", e.source) for e in problem.edges])
    out = np.array([e.bytes + least(e.source, "sync_out_bytes", e.target) for e in problem.edges])
    crossing = source * absent
    total = (crossing @ into)[:, None] + (crossing @ out)[None] - (source * (into + out)) @ absent.T
    return np.asarray(2 / problem.bandwidth_bytes_per_s * np.maximum(total, 0.0))
