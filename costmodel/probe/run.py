"""Measures a machine within a time budget: estimates, then repeats in random order, then more
sizes where curves bend. Rank 0 decides what comes next; all ranks do it at once."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from ...ir.errors import InvalidInput
from ..probe_sizes import next_size
from ..ranks import Report, Team
from .exchange import Exchange, moved_bytes
from .fit import Line, fitted_line
from .noise import Array, padded, repeats_of
from .rounds import Family, Nodes, Pairs, families, rounds
from .schedule import (
    COLLECTIVES,
    LEAST_REPEATS,
    SIZES_BYTES,
    Item,
    Lot,
    Series,
    affordable,
    inner_count,
    next_batch,
    shuffled,
    spent_s,
)
from .words import sized

_ESTIMATED_BYTES = (SIZES_BYTES[0], 2**20)
"""Sizes from which the cost of all others is estimated: bound by latency, and by bandwidth."""
_BATCH_S = 1.0
_TARGET_S = 4e-3
"""How long the operations of one measurement should take together: some ten times what ranks
differ by when they start."""
_MOST_INNER = 20
_MORE_SIZES = 4
_BEND_FRACTION = 0.03
_BEND_SIGMAS = 4.0
"""An uncertainty below either is not worth a measurement."""
_RESERVED_FRACTION = 0.12
"""Of the budget, for the sizes where curves bend."""
_MESSAGES_FRACTION = 0.35
"""Of the budget, for messages: all rounds of pairs make one size, so that they cost most."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Every measurement of every rank.

    `seconds` and `waited_s` are (ranks, items), NaN where a rank had no part. `left_out` are sizes
    that did not fit the time, `too_large` the first size that did not fit the memory (None: all
    did).
    """

    nodes: Nodes
    families: tuple[Family, ...]
    rounds: tuple[Pairs, ...]
    items: tuple[Item, ...]
    seconds: Array
    waited_s: Array
    left_out: tuple[tuple[Series, int], ...]
    too_large: int | None


@dataclass(slots=True)
class _Session:
    """What one rank has measured, and what rank 0 expects measurements to take."""

    exchange: Exchange
    items: list[Item] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    took_s: dict[tuple[Series, int], float] = field(default_factory=dict)

    def run(self, items: list[Item]) -> None:
        """Measures items, the same on all ranks."""
        for item in items:
            before = time.perf_counter()
            sample = self.exchange.measure(item)
            self.items.append(item)
            self.seconds.append(sample.seconds)
            self.waited_s.append(sample.waited_s)
            took = time.perf_counter() - before
            key = item.series, item.bytes
            # The mean of what was expected and what was seen: single items vary.
            self.took_s[key] = (self.took_s.get(key, took) + took) / 2


def measured(
    team: Team, nodes: Nodes, budget_s: float, memory_bytes: int, seed: int, report: Report
) -> Measured | None:
    """Probes all links and groups; the result is on rank 0 only.

    `memory_bytes` is what one rank may use, the least of all. Larger messages are left out, and
    said to be; raises InvalidInput where there is no room for the smallest.
    """
    deadline = time.monotonic() + budget_s
    kinds, pairs = families(nodes), rounds(nodes.world_size)
    sizes = tuple(size for size in SIZES_BYTES if 2 * size <= memory_bytes)
    if not sizes:
        raise InvalidInput(
            f"probe: each rank has {memory_bytes} bytes of memory free for messages, "
            f"expected {2 * SIZES_BYTES[0]} at least: start fewer ranks on a machine"
        )
    too_large = next((size for size in SIZES_BYTES if size not in sizes), None)
    series = [Series("send")]
    series += [Series(kind, at) for kind in COLLECTIVES for at in range(len(kinds))]
    session = _Session(Exchange.of(team, kinds, pairs, sizes[-1]))

    report(0.0, "estimating")
    lots = _estimate(team, session, series, sizes, len(pairs))
    estimates = len(session.items)
    chosen = team.told(lambda: _chosen(lots, deadline - time.monotonic()))
    todo = shuffled(chosen, seed)
    for lot in lots:
        session.took_s[lot.series, lot.bytes] = lot.seconds / len(lot.rounds)
    _work_off(team, session, todo, deadline, report)
    extra = 0
    while extra < _MORE_SIZES:
        more = _where_curves_bend(team, session, kinds, estimates, deadline)
        if not more:
            break
        report(1.0, "more sizes where curves bend")
        _work_off(team, session, shuffled(more, seed + 1 + extra), deadline, report)
        extra += 1

    rows = team.gathered((np.array(session.seconds), np.array(session.waited_s)))
    if not rows:
        return None
    done = {(item.series, item.bytes) for item in session.items[estimates:]}
    return Measured(
        nodes,
        kinds,
        pairs,
        tuple(session.items[estimates:]),
        np.stack([seconds[estimates:] for seconds, _ in rows]),
        np.stack([waited[estimates:] for _, waited in rows]),
        tuple((s, size) for s in series for size in sizes if (s, size) not in done),
        too_large,
    )


def _estimate(
    team: Team, session: _Session, series: list[Series], sizes: tuple[int, ...], turns: int
) -> list[Lot]:
    """Measures every series at two sizes, which also opens its connections; lots for all sizes."""
    probes = [size for size in _ESTIMATED_BYTES if size <= sizes[-1]]
    lots: list[Lot] = []
    for each in series:
        walls, times = [], []
        for size in probes:
            session.run([Item(each, size)])  # opens connections
            before = time.perf_counter()
            session.run([Item(each, size)])
            walls.append(time.perf_counter() - before)
            # Rank 0 is in every group; among the pairs of round 0 it may be the one that rests.
            own_s = session.seconds[-1]
            times.append(own_s if np.isfinite(own_s) else walls[-1])
        lots += _lots(each, sizes, turns, fitted_line(probes, times), walls[0] - times[0])
    session.took_s.clear()
    return team.told(lambda: lots)


def _lots(
    series: Series, sizes: tuple[int, ...], turns: int, line: Line, around_s: float
) -> list[Lot]:
    """What a series costs at each size, where the others' waiting costs `around_s` per item."""
    messages = series.kind == "send"
    at = tuple(range(turns)) if messages else (0,)
    lots = []
    for size in sizes:
        inner = inner_count(line.seconds(size), _TARGET_S, _MOST_INNER)
        if messages:  # each way, and once there and back without anything
            operations_s = 2 * inner * (line.seconds(size) + line.latency_s)
        else:
            operations_s = (inner + (inner > 1)) * line.seconds(size)
        lots.append(Lot(series, size, (max(around_s, 0.0) + operations_s) * len(at), at, inner))
    return lots


def _chosen(lots: list[Lot], budget_s: float) -> dict[Lot, int]:
    """What fits the budget: first the messages, then, with what they leave, the collectives."""
    messages = [lot for lot in lots if lot.series.kind == "send"]
    chosen = affordable(messages, budget_s * _MESSAGES_FRACTION)
    left_s = budget_s * (1 - _RESERVED_FRACTION) - spent_s(chosen)
    return chosen | affordable([lot for lot in lots if lot not in messages], left_s)


def _work_off(
    team: Team, session: _Session, todo: list[Item], deadline: float, report: Report
) -> None:
    """Measures the items batch by batch; where time runs out, the costliest that are left go, but
    every pair is asked once, with its smallest message."""
    count, left = len(todo), list(todo)
    needed = _once_each(todo)

    def batch() -> list[Item]:
        kept = _trimmed(left, session.took_s, deadline - time.monotonic())
        stay = needed | {id(item) for item in kept}
        left[:] = [item for item in left if id(item) in stay]
        items = next_batch(left, session.took_s, _BATCH_S)
        del left[: len(items)]
        return items

    while items := team.told(batch):
        session.run(items)
        report(1 - len(left) / count, f"{items[-1].series.kind} {sized(items[-1].bytes)}")


def _once_each(todo: list[Item]) -> set[int]:
    """The first item of every round of pairs with the smallest message, by identity."""
    messages = [item for item in todo if item.series.kind == "send"]
    least = min((item.bytes for item in messages), default=0)
    first: dict[int, Item] = {}
    for item in messages:
        if item.bytes == least:
            first.setdefault(item.round, item)
    return {id(item) for item in first.values()}


def _trimmed(
    todo: list[Item], took_s: dict[tuple[Series, int], float], left_s: float
) -> list[Item]:
    """The items that fit the time left: the costliest kinds of measurement go first."""
    cost: dict[tuple[Series, int], float] = defaultdict(float)
    for item in todo:
        cost[item.series, item.bytes] += took_s[item.series, item.bytes]
    total = sum(cost.values())
    for kind in sorted(cost, key=lambda key: -cost[key]):
        if total <= max(left_s, 0.0):
            break
        total -= cost.pop(kind)
    return [item for item in todo if (item.series, item.bytes) in cost]


def _where_curves_bend(
    team: Team,
    session: _Session,
    kinds: tuple[Family, ...],
    estimates: int,
    deadline: float,
) -> dict[Lot, int]:
    """One more size for each collective whose curve is uncertain somewhere, as the time allows."""

    def decide() -> dict[Lot, int]:
        found: dict[Series, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        pairs = zip(session.items[estimates:], session.seconds[estimates:], strict=True)
        for item, seconds in pairs:
            if item.series.kind != "send":
                found[item.series][item.bytes].append(seconds)
        lots = []
        for series, points in found.items():
            sizes = sorted(points)
            times = [float(np.median(points[size])) for size in sizes]
            # What looks like a bend within the noise is none.
            noise = repeats_of(padded([points[size] for size in sizes])).noise
            tolerance = max(_BEND_FRACTION, _BEND_SIGMAS * noise.floor_fraction)
            wanted = next_size(sizes, times, None, tolerance) if len(sizes) > 2 else None
            if wanted is None:
                continue
            size = moved_bytes(series.kind, int(wanted), kinds[series.family].size)
            if size in points:
                continue
            near = min(points, key=lambda known: abs(np.log(known / size)))
            seconds = session.took_s[series, near] * max(1.0, size / near)
            template = next(i for i in session.items if (i.series, i.bytes) == (series, near))
            lots.append(Lot(series, size, seconds, inner=template.inner))
        left_s = deadline - time.monotonic()
        kept: dict[Lot, int] = {}
        for lot in sorted(lots, key=lambda lot: lot.seconds):
            if LEAST_REPEATS * lot.seconds <= left_s:
                kept[lot] = LEAST_REPEATS + 1 if 3 * lot.seconds <= left_s else LEAST_REPEATS
                left_s -= kept[lot] * lot.seconds
                session.took_s[lot.series, lot.bytes] = lot.seconds
        return kept

    return team.told(decide)
