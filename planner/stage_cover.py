"""The fewest devices on which stages cover a model, by a dynamic program over downsets.

What a stage holds in flight depends on the replicas of all stages after it, Σ d, so the program
runs from the last stage backwards; of ways to cover what comes after a downset those are kept that
no other beats in both Σ d and devices. Of the replicas that keep a stage within its pace and memory
at a given Σ d the fewest are the best: they leave less in flight before them, and more devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .downsets import Ints
from .stage_intervals import Intervals


@dataclass(frozen=True, slots=True)
class Chosen:
    """A stage of a cover: a row of the intervals, its replicas, and its microbatches in flight."""

    row: int
    replicas: int
    in_flight: int


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Stages at the replicas that can be the fewest: rows in the order of `Intervals`, replicas,
    and the most replicas after them."""

    row: Ints
    replicas: Ints
    after: Ints

    @staticmethod
    def of(replicas: Ints, most_in_flight: Ints) -> Moves:
        """`most_in_flight` [rows, replicas] are microbatches, 0 where a stage cannot be; `replicas`
        ascend."""
        # ceil((after + d) / d) <= y
        after = np.where(most_in_flight > 0, (most_in_flight - 1) * replicas, -1)
        before = np.maximum.accumulate(after, axis=1)
        before = np.concatenate([np.full((len(after), 1), -1), before[:, :-1]], axis=1)
        row, at = np.nonzero(after > before)
        return Moves(row, replicas[at], after[row, at])


def fewest_devices(
    intervals: Intervals, moves: Moves, devices: int, most_replicas: int
) -> list[Chosen] | None:
    """Stages from first to last on the fewest devices, of which there are `devices`, with Σ d at
    most `most_replicas`; None where there are none."""
    count = len(intervals.downsets.masks)
    first, last = intervals.first[moves.row], intervals.last[moves.row]
    cost = intervals.degree[moves.row] * moves.replicas
    least = _least_before(first, last, cost, count, devices)
    if least[-1] > devices:
        return None
    keep = least[first] + cost <= devices
    order = np.argsort(first[keep], kind="stable")
    row, replicas, after, cost, first, last = (
        each[keep][order] for each in (moves.row, moves.replicas, moves.after, cost, first, last)
    )
    begins = np.searchsorted(first, np.arange(count + 1))
    # Ways to cover what is outside a downset: (Σ d, devices, move, the way after it), in one list.
    ways = np.zeros((4, 1), np.intp)
    ways[2:] = -1
    starts, counts = np.zeros(count, np.intp), np.zeros(count, np.intp)
    counts[-1] = 1
    parts, size = [ways], 1
    flat = ways
    for at in range(count - 2, -1, -1):
        own = np.arange(begins[at], begins[at + 1])
        own = own[counts[last[own]] > 0]
        if not len(own):
            continue
        many = counts[last[own]]
        move = np.repeat(own, many)
        offset = np.arange(len(move)) - np.repeat(np.cumsum(many) - many, many)
        way = np.repeat(starts[last[own]], many) + offset
        total, used = flat[0, way] + replicas[move], flat[1, way] + cost[move]
        fits = (flat[0, way] <= after[move]) & (total <= most_replicas)
        fits &= used + least[at] <= devices
        total, used, move, way = total[fits], used[fits], move[fits], way[fits]
        best = np.lexsort((used, total))
        fewer = np.minimum.accumulate(used[best])
        best = best[np.append(True, fewer[1:] < fewer[:-1])[: len(best)]]
        if not len(best):
            continue
        starts[at], counts[at] = size, len(best)
        parts.append(np.stack([total[best], used[best], move[best], way[best]]))
        size += len(best)
        flat = np.concatenate([flat, parts[-1]], axis=1)
    if not counts[0]:
        return None
    at = starts[0] + int(np.argmin(flat[1, starts[0] : starts[0] + counts[0]]))
    chosen = []
    while flat[2, at] >= 0:
        total, _, move, way = flat[:, at]
        d = int(replicas[move])
        chosen.append(Chosen(int(row[move]), d, -(-int(total) // d)))
        at = way
    return chosen


def _least_before(first: Ints, last: Ints, cost: Ints, count: int, devices: int) -> Ints:
    """What any stages that make up a downset take at least, were memory no matter."""
    order = np.argsort(last, kind="stable")
    first, last, cost = first[order], last[order], cost[order]
    begins = np.searchsorted(last, np.arange(count + 1))
    least = np.full(count, devices + 1)
    least[0] = 0
    for at in range(1, count):
        own = slice(begins[at], begins[at + 1])
        if begins[at] < begins[at + 1]:
            least[at] = min(devices + 1, (least[first[own]] + cost[own]).min())
    return least
