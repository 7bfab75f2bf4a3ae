"""What to measure in which order, and what to leave out when the time is short."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from ..curves import CollectiveKind

SIZES_BYTES = tuple(2**k for k in (13, 15, 17, 19, 22, 24, 26, 28))
"""8 KiB to 256 MiB in eight steps, at powers of two, where libraries change their algorithms."""
COLLECTIVES: tuple[CollectiveKind, ...] = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast",
)  # fmt: skip
MOST_REPEATS = 5
LEAST_REPEATS = 2
"""Fewer leave nothing to tell noise by; then the size is left out instead."""


@dataclass(frozen=True, slots=True, order=True)
class Series:
    """What one curve is made of: a collective over a family of groups (by its place in the list of
    families), or messages of the pairs of all rounds."""

    kind: CollectiveKind
    family: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Item:
    """One measurement that all ranks make at once: `inner` operations of a size, one after the
    other. `round` is the round of pairs, of messages."""

    series: Series
    bytes: int
    round: int = 0
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Lot:
    """All measurements of a series at one size; `seconds` what one repeat of them takes."""

    series: Series
    bytes: int
    seconds: float
    rounds: tuple[int, ...] = (0,)
    inner: int = 1

    def items(self) -> list[Item]:
        """One repeat."""
        return [Item(self.series, self.bytes, at, self.inner) for at in self.rounds]


def affordable(
    lots: Iterable[Lot], budget_s: float, most: int = MOST_REPEATS, least: int = LEAST_REPEATS
) -> dict[Lot, int]:
    """How often to repeat each lot so that all take at most `budget_s` seconds.

    The costliest lot loses a repeat until all fit; with `least` repeats left it goes, and so do
    the larger sizes of its series, so that every curve is measured up to some size without holes.
    The smallest size of a series stays in any case, once at least.
    """
    kept = dict.fromkeys(sorted(lots, key=lambda lot: (lot.series, lot.bytes)), most)
    smallest = {lot.series: lot for lot in reversed(kept)}
    total = spent_s(kept)
    queue = [(-lot.seconds * repeats, place) for place, (lot, repeats) in enumerate(kept.items())]
    order = list(kept)
    heapq.heapify(queue)
    while total > budget_s and queue:
        cost, place = heapq.heappop(queue)
        lot = order[place]
        if lot not in kept or -cost != lot.seconds * kept[lot]:
            continue  # gone, or reduced since
        if kept[lot] > (1 if smallest[lot.series] is lot else least):
            kept[lot] -= 1
            total -= lot.seconds
            heapq.heappush(queue, (-lot.seconds * kept[lot], place))
        elif smallest[lot.series] is not lot:
            for larger in [x for x in kept if x.series == lot.series and x.bytes >= lot.bytes]:
                total -= larger.seconds * kept.pop(larger)
    return kept


def spent_s(repeats: Mapping[Lot, int]) -> float:
    """Seconds of all lots with their repeats."""
    return sum(lot.seconds * times for lot, times in repeats.items())


def shuffled(repeats: Mapping[Lot, int], seed: int) -> list[Item]:
    """All measurements, repeat by repeat, each repeat in an order of its own.

    So no link is always measured after the same other one, and what is cut at the end costs
    repeats rather than links.
    """
    draw = random.Random(seed)
    found: list[Item] = []
    for repeat in range(max(repeats.values(), default=0)):
        turn = [item for lot, times in repeats.items() if times > repeat for item in lot.items()]
        draw.shuffle(turn)
        found += turn
    return found


def next_batch(
    items: Sequence[Item], seconds: Mapping[tuple[Series, int], float], at_most_s: float
) -> list[Item]:
    """The first items, as many as take `at_most_s` seconds, one at least."""
    spent = accumulate(seconds[item.series, item.bytes] for item in items)
    return list(items[: max(1, sum(1 for _ in takewhile(lambda s: s <= at_most_s, spent)))])


def inner_count(seconds: float, target_s: float, most: int) -> int:
    """How many operations one measurement of `target_s` seconds holds."""
    return max(1, min(most, int(target_s / seconds))) if seconds > 0 else most
