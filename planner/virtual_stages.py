"""Cutting a chain into virtual stages, several on every pipeline rank.

A rank's memory and work are those of all its stages together, so that no dynamic program over
contiguous cuts sees them. Stages start as even as they can be, and layers move, one at a time, from
the rank that sets the pace to one that has time left, while that helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..ir.plan import Recompute
from .request import Layers
from .stages import Cut, Rank, Shortfall, modes_of

_MOST_TARGETS = 3
"""Ranks with the least work that a layer is offered to."""


def layers_before(layers: int, stages: int, first: int) -> int:
    """Layers in the first so many virtual stages, at least.

    Stages have as many layers as there are to each, or one more; the first and the last, which hold
    the ends of the model as well, may have one fewer.
    """
    each = layers // stages
    return max(first * each - (first > 0), layers - (stages - first) * (each + 1), 0)


def even_enough(counts: Sequence[int]) -> bool:
    """Whether virtual stages have as even numbers of layers as `layers_before` says."""
    each = sum(counts) // len(counts)
    inside = all(each <= count <= each + 1 for count in counts[1:-1])
    return inside and all(each - 1 <= counts[v] <= each + 1 for v in (0, -1))


@dataclass(frozen=True, slots=True)
class _Content:
    """What a rank has to do: modes of its segments in order, seconds, bytes short."""

    modes: tuple[Recompute, ...]
    seconds: float
    short_bytes: float


@dataclass(slots=True)
class _Shares:
    """Layers per virtual stage, and what the ranks make of them."""

    ranks: Sequence[Rank]
    placement: Sequence[int]
    layers: Layers
    segments: int
    microbatches: int
    counts: list[int]
    known: dict[tuple[int, tuple[int, ...]], _Content]

    @property
    def bounds(self) -> list[int]:
        """Segment bounds: what comes before the layers goes to the first stage, what comes after to
        the last."""
        found = [0]
        position = self.layers.first
        for count in self.counts:
            position += count
            found.append(position)
        found[-1] = self.segments
        return found

    def contents(self) -> list[_Content]:
        """Every rank's."""
        every: list[list[int]] = [[] for _ in self.ranks]
        for rank, ends in zip(self.placement, pairwise(self.bounds), strict=True):
            every[rank] += range(*ends)
        found = []
        for rank, own in enumerate(every):
            key = (rank, tuple(own))
            if key not in self.known:
                self.known[key] = _Content(*modes_of(self.ranks[rank], own))
            found.append(self.known[key])
        return found

    def allowed(self) -> bool:
        """Whether stages are as even as they should be, and none is empty."""
        filled = all(first < last for first, last in pairwise(self.bounds))
        return filled and even_enough(self.counts)

    def objective(self, contents: Sequence[_Content]) -> tuple[float, float]:
        """Bytes short, then the time of the schedule as far as work decides it."""
        short = sum(max(0.0, content.short_bytes) for content in contents)
        seconds = [content.seconds for content in contents]
        return short, (self.microbatches - 1) * max(seconds) + sum(seconds) / len(seconds)


def cut_virtual(
    ranks: Sequence[Rank],
    placement: Sequence[int],
    layers: Layers,
    segments: int,
    microbatches: int,
    given: tuple[int, ...] | None = None,
) -> Cut | Shortfall:
    """Cuts the chain into `len(placement)` stages, stage v on rank `placement[v]`.

    `layers` are the segments that may be shared out, `given` how many of them every stage has,
    where that is fixed.
    """
    stages = len(placement)
    each, rest = divmod(layers.count, stages)
    counts = [each + (stages - rest <= v) for v in range(stages)] if given is None else [*given]
    shares = _Shares(ranks, placement, layers, segments, microbatches, counts, {})
    contents = shares.contents()
    best = shares.objective(contents)
    while given is None and (better := _improved(shares, contents, best)) is not None:
        contents, best = better
    whole = all(first < last for first, last in pairwise(shares.bounds))
    if best[0] > 0 or not whole:
        limit = max(rank.limit_bytes for rank in ranks)
        return Shortfall(limit + max(content.short_bytes for content in contents)
                         if whole else float("inf"))  # fmt: skip
    left = [list(content.modes) for content in contents]
    modes, seconds = [], []
    for rank, (first, last) in zip(placement, pairwise(shares.bounds), strict=True):
        own, left[rank] = left[rank][: last - first], left[rank][last - first :]
        modes.append(tuple(own))
        table = ranks[rank].table
        seconds.append(sum(float(table.seconds[table.modes.index(mode), first + k])
                           for k, mode in enumerate(own)))  # fmt: skip
    return Cut(tuple(shares.bounds), tuple(modes), tuple(seconds))


def _improved(
    shares: _Shares, contents: Sequence[_Content], now: tuple[float, float]
) -> tuple[list[_Content], tuple[float, float]] | None:
    """Moves one layer so that the objective falls, or says that no move does."""
    order = sorted(range(len(contents)), key=lambda r: (contents[r].short_bytes > 0,
                                                        contents[r].seconds))  # fmt: skip
    giver = order[-1]
    for taker in order[:_MOST_TARGETS]:
        if taker == giver:
            continue
        for source in _stages_on(shares, giver, largest=True):
            for target in _stages_on(shares, taker, largest=False):
                shares.counts[source] -= 1
                shares.counts[target] += 1
                if shares.allowed():
                    found = shares.contents()
                    objective = shares.objective(found)
                    if objective < now:
                        return found, objective
                shares.counts[source] += 1
                shares.counts[target] -= 1
    return None


def _stages_on(shares: _Shares, rank: int, largest: bool) -> list[int]:
    """A rank's stage that has most layers to give, or fewest to take more."""
    own = [v for v, at in enumerate(shares.placement) if at == rank]
    own = [v for v in own if shares.counts[v] > 0 or not largest]
    key = (lambda v: -shares.counts[v]) if largest else (lambda v: shares.counts[v])
    return sorted(own, key=key)[:1]
