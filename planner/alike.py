"""Intervals of a chain of segments that are alike: as many segments of every kind.

A model of a hundred equal layers has five thousand intervals and a few hundred kinds of them. What
a stage takes depends on the kind alone, so tables have a row per kind, and an index says which.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Alike:
    """`kind_of[i]` is the kind of segment i. `counts[u, k]`: how many segments of kind k an
    interval of sort u has; `index[i, j]`: the sort of segments i ... j-1, `len(counts)` where that
    is empty."""

    kind_of: Ints
    counts: Array
    index: Ints

    @staticmethod
    def of(kinds: Sequence[Hashable]) -> Alike:
        """The intervals of a chain of segments, given what makes them alike."""
        names = {kind: at for at, kind in enumerate(dict.fromkeys(kinds))}
        kind_of = np.array([names[kind] for kind in kinds], np.intp)
        count = len(kinds)
        # Sums of random 64-bit numbers, one for each kind, tell multisets of kinds apart.
        numbers = np.random.default_rng(0).integers(1, 2**63, len(names), np.uint64)
        sums = np.append(np.uint64(0), np.cumsum(numbers[kind_of], dtype=np.uint64))
        first, last = np.triu_indices(count + 1, 1)
        _, where, sort = np.unique(sums[last] - sums[first], return_index=True, return_inverse=True)
        index = np.full((count + 1, count + 1), len(where), np.intp)
        index[first, last] = sort
        so_far = np.zeros((count + 1, len(names)))
        np.cumsum(kind_of[:, None] == np.arange(len(names)), axis=0, out=so_far[1:])
        return Alike(kind_of, so_far[last[where]] - so_far[first[where]], index)

    @property
    def segments(self) -> int:
        return len(self.kind_of)

    @cached_property
    def first_of(self) -> Ints:
        """A segment of each kind."""
        found: Ints = np.unique(self.kind_of, return_index=True)[1]
        return found

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """[sort, kind]: whether an interval has a segment of the kind."""
        return self.counts > 0

    def sums(self, per_segment: Array) -> Array:
        """Sums over every sort of interval of what is alike for segments of a kind."""
        found: Array = self.counts @ per_segment[self.first_of]
        return found

    def peaks(self, per_segment: Array) -> Array:
        """The largest of every sort of interval."""
        found: Array = np.where(self.present, per_segment[self.first_of], 0.0).max(axis=1)
        return found
