"""Stages: where the chain of segments is cut, and what each stage recomputes.

Exact over contiguous cuts: for every sort of interval of segments the least time that fits the
memory of a pipeline rank, then a dynamic program over the cuts for every admissible pace of the
slowest stage. Ranks may differ in device, memory and microbatches in flight. Recompute modes mix
inside a stage: layers move from `none` to `selective` to `full` only as far as memory asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..ir.plan import Recompute
from .alike import Alike, Array, Ints

_SAME = 1 + 1e-12
"""Paces are sums of the same numbers in another order."""
_PACE_GAIN = 1e-4
"""Slower paces are tried while they could still gain more than this."""


@dataclass(frozen=True, slots=True, eq=False)
class SegmentTable:
    """Per segment and mode (rows: modes in order of growing time), for one rank and microbatch.

    `seconds`, `kept` and `workspace` (bytes) are [modes, segments]; `fixed` (bytes of parameter
    state) is [segments], and `waits` (seconds) what a microbatch takes at least because of
    communication that runs beside compute (ZeRO). `host` (bytes, [modes, segments]) waits in host
    memory; only the last mode may put some there. `shared`: (first use, last use, bytes) of state
    that both uses of a tied parameter would count twice in one stage. Segments of a kind have equal
    columns.
    """

    modes: tuple[Recompute, ...]
    seconds: Array
    kept: Array
    workspace: Array
    fixed: Array
    shared: tuple[tuple[int, int, float], ...] = ()
    waits: Array | None = None
    host: Array | None = None


@dataclass(frozen=True, slots=True)
class Rank:
    """A pipeline rank: what segments take on it, the microbatches alive in it at once, and the
    bytes that all of it may hold, on the device and in host memory."""

    table: SegmentTable
    in_flight: float
    limit_bytes: float
    host_bytes: float = float("inf")


@dataclass(frozen=True, slots=True)
class Cut:
    """Chosen stages: segment bounds, and per stage the mode of each segment and the seconds."""

    bounds: tuple[int, ...]
    modes: tuple[tuple[Recompute, ...], ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Shortfall:
    """No cut fits: the least bytes the fullest stage would need. `proved`: none can, whatever is
    recomputed; otherwise none was found."""

    needed_bytes: float
    proved: bool = True


def cut_stages(
    ranks: Sequence[Rank],
    alike: Alike,
    microbatches: int,
    stage_of: Sequence[int | None],
    fixed_bounds: tuple[int, ...] | None = None,
) -> Cut | Shortfall:
    """The cut with the least `(m-1)·max_s T_s + Σ_s T_s` whose stages all fit their ranks.

    `stage_of[i]` pins a segment to a stage, `fixed_bounds` are `stages + 1` segment indices.
    """
    allowed = windows(len(ranks), alike.segments, stage_of, fixed_bounds)
    if allowed is None:
        return Shortfall(float("inf"))
    chain = _Chain(alike, least_seconds(ranks, alike), *allowed)
    finite = np.unique(np.concatenate([times[np.isfinite(times)] for times in chain.times]))
    low, high = 0, len(finite)
    while low < high:  # the least pace at which the chain can be cut at all
        middle = (low + high) // 2
        if chain.cut(finite[middle]) is not None:
            high = middle
        else:
            low = middle + 1
    if low == len(finite):
        return Shortfall(_least_bytes(ranks, alike, *allowed))
    best: tuple[float, list[int]] | None = None
    unhurried = chain.cut(float("inf"))
    assert unhurried is not None
    for pace in finite[low:]:
        least = (microbatches - 1) * pace + unhurried[0]
        if best is not None and least >= best[0] * (1 - _PACE_GAIN):
            break
        found = chain.cut(pace)
        assert found is not None
        objective = (microbatches - 1) * chain.slowest(found[1]) + found[0]
        if best is None or objective < best[0]:
            best = (objective, found[1])
    assert best is not None
    bounds = chain.balanced(best[1])
    stages = [modes_of(rank, range(*ends)) for rank, ends in
              zip(ranks, pairwise(bounds), strict=True)]  # fmt: skip
    return Cut(tuple(bounds), tuple(s[0] for s in stages), tuple(s[1] for s in stages))


def least_seconds(ranks: Sequence[Rank], alike: Alike, floor: bool = False) -> list[Array]:
    """Per rank, the least seconds of a microbatch for every sort of interval, in modes that fit the
    memory; inf where none do, and for the empty interval at the end. `floor`: as if nothing but
    state and kept activations took memory, which no program can go below."""
    known: dict[tuple[int, float, float, float], Array] = {}
    found = []
    for rank in ranks:
        key = (id(rank.table), rank.in_flight, rank.limit_bytes, rank.host_bytes)
        if key not in known:
            known[key] = _times(rank, alike, floor)
        found.append(known[key])
    return found


@dataclass(frozen=True, slots=True)
class PipelineFloor:
    """What a schedule takes at least, by the seconds `T_s` of its stages for a microbatch.

    `passes·ΣT + sent_s`, and for every stage `share·ΣT + paces[s]·T_s` and `m·T_s`; where backwards
    are whole (`share` is 1) the design's bound, `m·T_s + Σ_{i<s} T_i`. What those with shares of T
    may be too high is `excess_s`.
    """

    microbatches: int
    passes: float
    paces: Array
    share: float
    sent_s: float = 0.0
    excess_s: float = 0.0


def pipeline_floor_seconds(
    ranks: Sequence[Rank], alike: Alike, floor: PipelineFloor, worth_s: float
) -> float:
    """No cut takes less, whatever it recomputes. To within 1e-4 from below; inf where it is above
    `worth_s`."""
    bounds = windows(len(ranks), alike.segments, [None] * alike.segments, None)
    if bounds is None:
        return float("inf")
    chain = _Chain(alike, least_seconds(ranks, alike, floor=True), *bounds)
    least = chain.cut(float("inf"))
    if least is None or not chain.within(worth_s, floor, least[0]):
        return float("inf")
    low, high = 0.0, worth_s
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if chain.within(middle, floor, least[0]):
            high = middle
        else:
            low = middle
    return low


def windows(
    stages: int,
    count: int,
    stage_of: Sequence[int | None],
    fixed_bounds: tuple[int, ...] | None,
) -> tuple[Ints, Ints] | None:
    """The least and the greatest segment at which each stage may begin (and the last end), pins and
    fixed bounds kept; None where they contradict."""
    low = np.arange(stages + 1)
    high = count - low[::-1]
    low[stages], high[0] = count, 0
    if fixed_bounds is not None:
        low, high = np.maximum(low, fixed_bounds), np.minimum(high, fixed_bounds)
    for i, stage in enumerate(stage_of):
        if stage is not None:
            if stage >= stages:
                return None
            high[stage] = min(high[stage], i)
            low[stage + 1] = max(low[stage + 1], i + 1)
    for s in range(stages):
        low[s + 1] = max(low[s + 1], low[s] + 1)
        high[stages - s - 1] = min(high[stages - s - 1], high[stages - s] - 1)
    return None if (low > high).any() else (low, high)


class _Chain:
    """The dynamic program over the bounds of stages.

    More segments never take less time, so that at a pace the bounds that lead from the first
    segment to the last lie between a greedy run from each end.
    """

    def __init__(self, alike: Alike, times: Sequence[Array], low: Ints, high: Ints) -> None:
        self.alike, self.times, self.low, self.high = alike, times, low, high

    def cut(self, pace: float) -> tuple[float, list[int]] | None:
        """The cut with the least total seconds in which no stage takes longer than `pace`."""
        return self._least([np.where(t <= pace * _SAME, t, np.inf) for t in self.times], pace)

    def balanced(self, bounds: list[int]) -> list[int]:
        """Of the cuts as fast as `bounds` the most even one: a convex price on each stage's time,
        far below what any difference in time costs."""
        slowest = self.slowest(bounds)
        with np.errstate(over="ignore", invalid="ignore"):
            priced = [
                np.where(t <= slowest * _SAME, t + 1e-7 * t**2 / slowest, np.inf)
                for t in self.times
            ]
        found = self._least(priced, slowest)
        assert found is not None
        return found[1]

    def slowest(self, bounds: Sequence[int]) -> float:
        """The pace of a cut."""
        stages = zip(self.times, pairwise(bounds), strict=True)
        return max(float(t[self.alike.index[first, last]]) for t, (first, last) in stages)

    def within(self, step_s: float, floor: PipelineFloor, least_s: float) -> bool:
        """Whether stages of some cut keep a step of `step_s`; `least_s` is what all stages take
        together at least. Of all ways to a bound the one that has passed least is kept."""
        m, spare = floor.microbatches, max(0.0, step_s + floor.excess_s - floor.share * least_s)
        with np.errstate(divide="ignore", invalid="ignore"):
            paces = np.minimum(step_s / m, np.where(floor.paces > 0, spare / floor.paces, np.inf))
        times = [np.where(t <= pace * _SAME, t, np.inf)
                 for t, pace in zip(self.times, paces, strict=True)]  # fmt: skip
        found = self._narrow(float(paces.max()))
        if found is None:
            return False
        low, high = found
        passed = np.zeros(1)
        for s, each in enumerate(times):
            rows = slice(low[s], high[s] + 1)
            took = each[self.alike.index[rows, low[s + 1] : high[s + 1] + 1]]
            reached = passed[:, None] + took
            ends = m * took + passed[:, None] if floor.share == 1.0 else m * took
            reached[ends > step_s * _SAME] = np.inf
            passed = reached.min(axis=0)
        least = floor.passes * passed[-1] + floor.sent_s - floor.excess_s
        return bool(least <= step_s * _SAME)

    def _least(self, times: Sequence[Array], pace: float) -> tuple[float, list[int]] | None:
        found = self._narrow(pace)
        if found is None:
            return None
        low, high = found
        total, choice = np.zeros(1), []
        for s, each in enumerate(times):
            rows = slice(low[s], high[s] + 1)
            took = each[self.alike.index[rows, low[s + 1] : high[s + 1] + 1]]
            options = total[:, None] + took
            choice.append(np.argmin(options, axis=0))
            total = np.min(options, axis=0)
        if not np.isfinite(total[-1]):
            return None
        bounds = [int(high[-1])]
        for s in reversed(range(len(times))):
            bounds.append(int(low[s] + choice[s][bounds[-1] - low[s + 1]]))
        return float(total[-1]), bounds[::-1]

    def _narrow(self, pace: float) -> tuple[Ints, Ints] | None:
        """Bounds that can be reached from the first segment, and reach the last one, with no stage
        slower than `pace`; None where there are none."""
        index, stages = self.alike.index, len(self.times)
        low, high = self.low.copy(), self.high.copy()
        for s, times in enumerate(self.times):
            row = times[index[high[s], high[s] + 1 : high[s + 1] + 1]] <= pace * _SAME
            high[s + 1] = high[s] + int(np.argmin(row) if not row.all() else len(row))
            if high[s + 1] < low[s + 1] or high[s + 1] == high[s]:
                return None
        for s in reversed(range(stages)):
            column = self.times[s][index[low[s] : low[s + 1], low[s + 1]]] <= pace * _SAME
            fits = column[::-1]
            low[s] = low[s + 1] - int(np.argmin(fits) if not fits.all() else len(fits))
            if low[s] > high[s] or low[s] == low[s + 1]:
                return None
        return low, high


def _times(rank: Rank, alike: Alike, floor: bool) -> Array:
    table, alive, limit = rank.table, rank.in_flight, rank.limit_bytes
    state = _state(table, alike)
    seconds = [alike.sums(row) for row in table.seconds]
    kept = [alive * alike.sums(row) for row in table.kept]
    rooms = [limit - state - (0.0 if floor else alike.peaks(row)) for row in table.workspace]
    away = None if floor else _away(rank, alike)
    last = len(seconds) - 1
    best = np.full(len(state), np.inf)
    for cheap in range(len(seconds)):
        alone = kept[cheap] <= rooms[cheap]
        if away is not None and cheap == last:
            alone &= away <= rank.host_bytes
        best = np.minimum(best, np.where(alone, seconds[cheap], np.inf))
        for dear in range(cheap + 1, len(seconds)):
            room = np.minimum(rooms[cheap], rooms[dear])
            saved = kept[cheap] - kept[dear]
            excess = np.maximum(kept[cheap] - room, 0.0)
            possible = (excess <= saved) & (saved > 0)
            part = np.divide(excess, saved, out=np.zeros_like(excess), where=possible)
            saving = (table.kept[cheap] > table.kept[dear]).astype(np.float64)
            layers = np.maximum(alike.sums(saving), 1.0)
            share = part if floor else np.ceil(part * layers) / layers
            if (
                away is not None and dear == last
            ):  # and where it is faster, all that host memory has
                most = np.minimum(1.0, rank.host_bytes / np.maximum(away, 1.0))
                most = np.floor(most * layers + 1e-9) / layers
                possible &= share <= most
                share = np.where(seconds[dear] < seconds[cheap], most, share)
            mixed = seconds[cheap] + share * (seconds[dear] - seconds[cheap])
            best = np.minimum(best, np.where(possible, mixed, np.inf))
    if table.waits is not None:
        best = np.maximum(best, alike.sums(table.waits))
    return np.append(best, np.inf)  # a stage has at least one segment


def _away(rank: Rank, alike: Alike) -> Array | None:
    """Bytes in host memory where a whole interval is in the last mode."""
    table = rank.table
    return None if table.host is None else rank.in_flight * alike.sums(table.host[-1])


def _state(table: SegmentTable, alike: Alike) -> Array:
    state = alike.sums(table.fixed)
    for first, last, size in table.shared:
        both = alike.present[:, alike.kind_of[first]] & alike.present[:, alike.kind_of[last]]
        state = state - size * both
    return state


def modes_of(rank: Rank, segments: Sequence[int]) -> tuple[tuple[Recompute, ...], float, float]:
    """The modes of the segments of a rank, the seconds of a microbatch, and the bytes short.

    Of every pair of modes as few segments in the dearer one as memory asks, those that save most
    first; the fastest pair. All in the one that keeps least where nothing fits.
    """
    table, alive, own = rank.table, rank.in_flight, np.asarray(segments, np.intp)
    held = set(segments) if table.shared else set()
    state = float(table.fixed[own].sum())
    state -= sum(size for a, b, size in table.shared if a in held and b in held)
    best: tuple[float, NDArray[np.intp]] | None = None
    every_kept = table.kept[:, own]
    for cheap in range(len(table.modes)):
        for dear in range(cheap, len(table.modes)):
            room = rank.limit_bytes - state
            room -= float(table.workspace[[cheap, dear]][:, own].max())
            kept = alive * float(every_kept[cheap].sum())
            saved = alive * (every_kept[cheap] - every_kept[dear])
            order = np.argsort(-saved, kind="stable")
            order = order[saved[order] > 0]
            left = np.append(kept, kept - np.cumsum(saved[order]))
            enough = np.flatnonzero(
                (left <= room * _SAME) & _fits_host(rank, own, cheap, dear, order)
            )
            if not len(enough):
                continue
            for count in (enough[0], enough[-1]) if table.host is not None else enough[:1]:
                picks = np.full(len(own), cheap)
                picks[order[:count]] = dear
                seconds = float(table.seconds[picks, own].sum())
                if best is None or seconds < best[0] - 1e-15:
                    best = (seconds, picks)
    short = 0.0
    if best is None:
        thrifty = _thriftiest(rank, own)
        picks = np.full(len(own), thrifty)
        best = (float(table.seconds[thrifty, own].sum()), picks)
        needed = state + alive * float(every_kept[thrifty].sum())
        short = needed + float(table.workspace[thrifty, own].max()) - rank.limit_bytes
        if table.host is not None:
            short = max(short, alive * float(table.host[thrifty, own].sum()) - rank.host_bytes)
    waits = 0.0 if table.waits is None else float(table.waits[own].sum())
    return tuple(table.modes[p] for p in best[1]), max(best[0], waits), short


def _fits_host(
    rank: Rank, own: Ints, cheap: int, dear: int, order: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Whether what the first so many of `order` in `dear`, the rest in `cheap`, put into host
    memory fits there."""
    host = rank.table.host
    if host is None:
        return np.ones(len(order) + 1, np.bool_)
    more = np.append(0.0, np.cumsum(host[dear, own][order] - host[cheap, own][order]))
    found: NDArray[np.bool_] = rank.in_flight * (host[cheap, own].sum() + more) <= rank.host_bytes
    return found


def _thriftiest(rank: Rank, own: NDArray[np.intp]) -> int:
    """The mode that keeps least of some segments, offloading only as far as host memory goes."""
    kept, host = rank.table.kept[:, own].sum(axis=1), rank.table.host
    if host is not None and len(kept) > 1:
        over = rank.in_flight * host[:, own].sum(axis=1) > rank.host_bytes
        kept = np.where(over, np.inf, kept)
    return int(np.argmin(kept))


def _least_bytes(ranks: Sequence[Rank], alike: Alike, low: Ints, high: Ints) -> float:
    """The fullest stage of the cut that needs the least memory, all recomputed."""
    worst = np.zeros(1)
    for s, rank in enumerate(ranks):
        table = rank.table
        thrifty = _thriftiest(rank, np.arange(alike.segments))
        need = _state(table, alike) + alike.peaks(table.workspace[thrifty])
        need = np.append(need + rank.in_flight * alike.sums(table.kept[thrifty]), np.inf)
        rows, columns = slice(low[s], high[s] + 1), slice(low[s + 1], high[s + 1] + 1)
        worst = np.maximum(worst[:, None], need[alike.index[rows, columns]]).min(axis=0)
    return float(worst[-1])
