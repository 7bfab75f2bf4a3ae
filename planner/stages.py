"""Stages: where the chain of segments is cut, and what each stage recomputes.

Exact over contiguous cuts: for every interval of segments and every number of microbatches in
flight the least time that fits the memory, then a dynamic program over the cuts for every
admissible pace of the slowest stage. Recompute modes mix inside a stage: layers move from `none`
to `selective` to `full` only as far as memory asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ir.plan import Recompute

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """Per segment and mode (rows: modes in order of growing time), for one rank and microbatch.

    `seconds`, `kept` and `workspace` (bytes) are [modes, segments]; `fixed` (bytes of parameter
    state) is [segments]. `shared`: (first use, last use, bytes) of state that both uses of a tied
    parameter would count twice in one stage.
    """

    modes: tuple[Recompute, ...]
    seconds: Array
    kept: Array
    workspace: Array
    fixed: Array
    shared: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """Chosen stages: segment bounds, and per stage the mode of each segment and the seconds."""

    bounds: tuple[int, ...]
    modes: tuple[tuple[Recompute, ...], ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Shortfall:
    """No cut fits: the least bytes the fullest stage would need."""

    needed_bytes: float


def cut_stages(
    table: SegmentTable,
    in_flight: Sequence[float],
    microbatches: int,
    limit_bytes: float,
    stage_of: Sequence[int | None],
    floor_seconds: Array | None = None,
    fixed_bounds: tuple[int, ...] | None = None,
) -> Cut | Shortfall:
    """The cut with the least `(m-1)·max_s T_s + Σ_s T_s` whose stages all fit `limit_bytes`.

    `in_flight[s]` microbatches are alive in stage s at once. `stage_of[i]` pins a segment to a
    stage. `floor_seconds` [segments] is what a microbatch of a stage takes at least because of
    communication that overlaps with its compute (ZeRO), added up over its segments.
    `fixed_bounds` are `stages + 1` segment indices.
    """
    stages, count = len(in_flight), table.seconds.shape[1]
    every = _Intervals(table)
    by_depth = {n: every.times(n, limit_bytes, floor_seconds) for n in set(in_flight)}
    times = [by_depth[n].copy() for n in in_flight]
    for s, matrix in enumerate(times):
        _forbid(matrix, s, stages, stage_of, fixed_bounds)
    finite = np.unique(np.concatenate([m[np.isfinite(m)] for m in times]))
    low, high = 0, len(finite)
    while low < high:  # the least pace at which the chain can be cut at all
        middle = (low + high) // 2
        if np.isfinite(_chain(times, finite[middle], count)[0]):
            high = middle
        else:
            low = middle + 1
    if low == len(finite):
        return Shortfall(_least_bytes(every, in_flight, stage_of, fixed_bounds))
    best: tuple[float, list[int]] | None = None
    unhurried = _chain(times, float("inf"), count)[0]
    for pace in finite[low:]:
        if best is not None and (microbatches - 1) * pace + unhurried >= best[0]:
            break
        total, cuts = _chain(times, pace, count)
        slowest = max(times[s][cuts[s], cuts[s + 1]] for s in range(stages))
        objective = (microbatches - 1) * slowest + total
        if best is None or objective < best[0]:
            best = (objective, cuts)
    assert best is not None
    bounds = _balanced(times, best[1], count)
    chosen, seconds = [], []
    for s, alive in enumerate(in_flight):
        first, last = bounds[s], bounds[s + 1]
        room = limit_bytes - every.state[first, last]
        picks = _modes(table, first, last, alive, float(room))
        busy = sum(float(table.seconds[p, first + k]) for k, p in enumerate(picks))
        waits = 0.0 if floor_seconds is None else float(floor_seconds[first:last].sum())
        chosen.append(tuple(table.modes[p] for p in picks))
        seconds.append(max(busy, waits))
    return Cut(tuple(bounds), tuple(chosen), tuple(seconds))


def _balanced(times: Sequence[Array], bounds: list[int], count: int) -> list[int]:
    """Of the cuts as fast as `bounds` the most even one: a convex price on each stage's time, far
    below what any difference in time costs."""
    slowest = max(float(times[s][bounds[s], bounds[s + 1]]) for s in range(len(times)))
    with np.errstate(over="ignore", invalid="ignore"):
        priced = [
            np.where(matrix <= slowest * (1 + 1e-12), matrix + 1e-7 * matrix**2 / slowest, np.inf)
            for matrix in times
        ]
    return _chain(priced, float("inf"), count)[1]


def _intervals(row: Array) -> Array:
    """Sums over [i, j) as an upper triangular [n+1, n+1] matrix."""
    prefix = np.concatenate([[0.0], np.cumsum(row)])
    return np.asarray(prefix[None, :] - prefix[:, None])


class _Intervals:
    """Sums and peaks over all intervals of segments, as [n+1, n+1] matrices."""

    def __init__(self, table: SegmentTable) -> None:
        self.table = table
        self.seconds = [_intervals(row) for row in table.seconds]
        self.kept = [_intervals(row) for row in table.kept]
        self.state = _intervals(table.fixed)
        for first, last, size in table.shared:
            self.state[: first + 1, last + 1 :] -= size
        self.peaks = [_running_peaks(row) for row in table.workspace]
        self.layers = [
            np.maximum(_intervals((table.kept[0] > row).astype(np.float64)), 1.0)
            for row in table.kept
        ]
        index = np.arange(self.state.shape[0])
        self.empty = index[:, None] >= index[None, :]

    def times(self, in_flight: float, limit_bytes: float, floor: Array | None) -> Array:
        """Least seconds of a microbatch for every interval that fits; inf elsewhere."""
        best = np.full_like(self.state, np.inf)
        for cheap in range(len(self.seconds)):
            room = limit_bytes - self.state - self.peaks[cheap]
            kept = in_flight * self.kept[cheap]
            best = np.minimum(best, np.where(kept <= room, self.seconds[cheap], np.inf))
            for dear in range(cheap + 1, len(self.seconds)):
                room = limit_bytes - self.state - np.maximum(self.peaks[cheap], self.peaks[dear])
                saved = kept - in_flight * self.kept[dear]
                excess = np.maximum(kept - room, 0.0)
                possible = (excess <= saved) & (saved > 0)
                part = np.divide(excess, saved, out=np.zeros_like(excess), where=possible)
                share = np.ceil(part * self.layers[dear]) / self.layers[dear]
                mixed = self.seconds[cheap] + share * (self.seconds[dear] - self.seconds[cheap])
                best = np.minimum(best, np.where(possible, mixed, np.inf))
        if floor is not None:
            best = np.maximum(best, _intervals(floor))
        best[self.empty] = np.inf  # a stage has at least one segment
        return best


def _running_peaks(row: Array) -> Array:
    count = len(row)
    peaks = np.zeros((count + 1, count + 1))
    for i in range(count):
        peaks[i, i + 1 :] = np.maximum.accumulate(row[i:])
    return peaks


def _forbid(
    matrix: Array,
    stage: int,
    stages: int,
    stage_of: Sequence[int | None],
    fixed_bounds: tuple[int, ...] | None,
) -> None:
    """Rules out intervals that pins or fixed bounds do not allow for a stage."""
    count = matrix.shape[0] - 1
    for i, pinned in enumerate(stage_of):
        if pinned is None:
            continue
        if pinned == stage:  # must be inside
            matrix[i + 1 :, :] = np.inf
            matrix[:, : i + 1] = np.inf
        else:
            matrix[: i + 1, i + 1 :] = np.inf
    if stage == 0:
        matrix[1:, :] = np.inf
    if stage == stages - 1:
        matrix[:, :count] = np.inf
    if fixed_bounds is not None:
        keep = matrix[fixed_bounds[stage], fixed_bounds[stage + 1]]
        matrix[:, :] = np.inf
        matrix[fixed_bounds[stage], fixed_bounds[stage + 1]] = keep


def _chain(times: Sequence[Array], pace: float, count: int) -> tuple[float, list[int]]:
    """The cut with the least total seconds in which no stage takes longer than `pace`."""
    total = np.full(count + 1, np.inf)
    total[0] = 0.0
    choice: list[NDArray[np.intp]] = []
    for matrix in times:
        options = total[:, None] + np.where(matrix <= pace * (1 + 1e-12), matrix, np.inf)
        choice.append(np.argmin(options, axis=0))
        total = np.min(options, axis=0)
    bounds = [count]
    if np.isfinite(total[count]):
        for picks in reversed(choice):
            bounds.append(int(picks[bounds[-1]]))
    return float(total[count]), bounds[::-1]


def _modes(
    table: SegmentTable, first: int, last: int, in_flight: float, limit_bytes: float
) -> list[int]:
    """The modes of one stage's segments (as rows): of every pair of modes as few segments in the
    dearer one as `limit_bytes` of activations and workspace ask, those that save most first; the
    fastest pair."""
    best: tuple[float, list[int]] | None = None
    for cheap in range(len(table.modes)):
        for dear in range(cheap, len(table.modes)):
            room = limit_bytes - float(table.workspace[[cheap, dear], first:last].max())
            picks = [cheap] * (last - first)
            kept = in_flight * float(table.kept[cheap, first:last].sum())
            saved = in_flight * (table.kept[cheap, first:last] - table.kept[dear, first:last])
            for k in np.argsort(-saved, kind="stable"):
                if kept <= room or saved[k] <= 0:
                    break
                picks[k] = dear
                kept -= float(saved[k])
            if kept > room:
                continue
            seconds = sum(float(table.seconds[p, first + k]) for k, p in enumerate(picks))
            if best is None or seconds < best[0] - 1e-15:
                best = (seconds, picks)
    assert best is not None  # an interval that was chosen fits
    return best[1]


def _least_bytes(
    every: _Intervals,
    in_flight: Sequence[float],
    stage_of: Sequence[int | None],
    fixed_bounds: tuple[int, ...] | None,
) -> float:
    """The fullest stage of the cut that needs the least memory, all recomputed."""
    stages = len(in_flight)
    thrifty = int(np.argmin(every.table.kept.sum(axis=1)))
    worst = np.full(every.state.shape[0], np.inf)
    worst[0] = 0.0
    for s, alive in enumerate(in_flight):
        need = every.state + every.peaks[thrifty] + alive * every.kept[thrifty]
        need[every.empty] = np.inf
        _forbid(need, s, stages, stage_of, fixed_bounds)
        worst = np.min(np.maximum(worst[:, None], need), axis=0)
    return float(worst[-1])
