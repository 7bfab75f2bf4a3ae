"""At which sizes to measure a collective: spread evenly first, then where the curve bends."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

from ..ir.errors import InvalidInput


def spread_sizes(candidates: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` of the candidate sizes (bytes, any order), closest to equal ratios between the
    smallest and the largest; all of them where there are no more.

    Raises InvalidInput for a count below 1 or no candidates.
    """
    if count < 1 or not candidates:
        raise InvalidInput(f"{count} sizes of {len(candidates)} candidates: expected at least 1")
    free = sorted(set(candidates))
    if count >= len(free):
        return tuple(free)
    low, high = log(free[0]), log(free[-1])
    # The ends come first: beside the largest there may be one whose logarithm is no smaller.
    chosen = [free.pop(0)] if count == 1 else [free.pop(0), free.pop()]
    for i in range(1, count - 1):
        wanted = low + (high - low) * i / (count - 1)
        nearest = min(free, key=lambda size: abs(log(size) - wanted))
        free.remove(nearest)
        chosen.append(nearest)
    return tuple(sorted(chosen))


def next_size(
    bytes: Sequence[float],
    seconds: Sequence[float],
    candidates: Sequence[float] | None = None,
    tolerance: float = 0.03,
) -> float | None:
    """The size at which one more measurement tells most, or None where none is worth it.

    `bytes` are the ascending sizes measured so far and `seconds` their times. It is the geometric
    middle of an interval, or the one of `candidates` nearest to that middle inside the interval, if
    only those can be measured. Two things make an interval doubtful:

    - its bounds: time does not fall with size, and bandwidth does not either. The times that both
      allow in the middle are far apart where latency gives way to bandwidth;
    - its ends: how far each is from the line between its own neighbours. A step shows there, even
      where its time looks like that of a steady bandwidth.

    The interval with the largest product of the two is next. None where neither is more than
    `tolerance` (a fraction of the time) in any interval, or where no interval can be divided: it
    has no candidate, or its ends are closer than 5 %.

    Raises InvalidInput where sizes and times do not pair up, do not ascend or are not positive.
    """
    _check(bytes, seconds)
    strange = _off_their_neighbours(bytes, seconds)
    best, most = None, 0.0
    for i in range(len(bytes) - 1):
        middle = _middle(bytes[i], bytes[i + 1], candidates)
        if middle is None:
            continue
        open_ = _between_bounds(bytes[i : i + 2], seconds[i : i + 2], middle)
        bent = max(strange[i], strange[i + 1])
        if max(open_, bent) <= log(1 + tolerance):
            continue
        # neither alone decides, but the larger breaks ties where the other is nothing
        doubt = open_ * bent + _NEXT_TO_NOTHING * max(open_, bent)
        if doubt > most:
            best, most = middle, doubt
    return best


_NEXT_TO_NOTHING = 1e-6
_CLOSEST_RATIO = 1.05


def _middle(low: float, high: float, candidates: Sequence[float] | None) -> float | None:
    if high < low * _CLOSEST_RATIO:
        return None
    middle = sqrt(low * high)
    if candidates is None:
        return middle
    inside = [size for size in candidates if low < size < high]
    return min(inside, key=lambda size: abs(log(size / middle)), default=None)


def _between_bounds(bytes: Sequence[float], seconds: Sequence[float], at: float) -> float:
    """Logarithm of the ratio of the bounds on the time at a size between two measured ones.

    Where the two break a rule, by how much.
    """
    same_time = sorted(seconds)
    same_bandwidth = sorted(time_s * at / size for size, time_s in zip(bytes, seconds, strict=True))
    least = max(same_time[0], same_bandwidth[0])
    most = min(same_time[1], same_bandwidth[1])
    return abs(log(most / least))


def _off_their_neighbours(bytes: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """For each size, the logarithm of its time over that of the line between its neighbours; the
    outermost have only one and are on it."""
    off = [0.0] * len(bytes)
    for i in range(1, len(bytes) - 1):
        share = (bytes[i] - bytes[i - 1]) / (bytes[i + 1] - bytes[i - 1])
        line_s = seconds[i - 1] + share * (seconds[i + 1] - seconds[i - 1])
        off[i] = abs(log(seconds[i] / line_s))
    return off


def _check(bytes: Sequence[float], seconds: Sequence[float]) -> None:
    if len(bytes) != len(seconds):
        raise InvalidInput(f"{len(bytes)} sizes and {len(seconds)} times: expected one for each")
    for i, (size, time_s) in enumerate(zip(bytes, seconds, strict=True)):
        if time_s <= 0 or size <= (bytes[i - 1] if i else 0):
            raise InvalidInput(
                f"size {i} is {size:g} bytes in {time_s:g} s: expected ascending sizes above 0 "
                "and times above 0"
            )
