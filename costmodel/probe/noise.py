"""What repeated measurements say: medians, a noise floor, and links that stand out beyond it.

In captures of pairwise bandwidth a third to a half of the spread comes from the order of measuring
(two captures of one cluster, differences between them against differences within). So a link counts
as slow only where it differs by more than repeated measurements of the same link do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MAD_PER_SIGMA = NormalDist().inv_cdf(0.75)
"""Median of the absolute value of normal noise, in standard deviations."""
_MEDIAN_PER_MEAN = (np.pi / 2) ** 0.5
"""Standard error of a median over that of a mean, for normal noise."""
_OUTLIER_SIGMAS = 5.0
_FALSE_ALARMS = 0.01
"""Accepted probability that any link of a healthy machine is called slow."""
_LEAST_SIGMAS = 4.0
_LEAST_FRACTION = 0.05
"""Links of healthy fabrics differ by some 2 % (the same captures); nothing hinges on less than
that twice over."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How well measurements repeat.

    `sigma_fraction` is the pooled relative spread of single measurements, `floor_fraction` that of
    medians of their repeats; `outliers` of `count` measurements lie further out than noise does.
    """

    sigma_fraction: float
    floor_fraction: float
    outliers: int
    count: int

    @staticmethod
    def over(parts: Iterable[Noise]) -> Noise:
        """Noise of several kinds of measurement: the middle spread, all outliers."""
        known = [part for part in parts if part.count]
        if not known:
            return Noise(0.0, 0.0, 0, 0)
        return Noise(
            float(np.median([part.sigma_fraction for part in known])),
            float(np.median([part.floor_fraction for part in known])),
            sum(part.outliers for part in known),
            sum(part.count for part in known),
        )


@dataclass(frozen=True, slots=True)
class Repeats:
    """Repeated measurements, one row per thing measured: the median of each, and their noise."""

    median: Array
    noise: Noise


_UNKNOWN_SIGMA = 1.0
"""Spread where nothing was measured twice: any single measurement may be off by a factor of e, so
nothing short of that stands out."""


def repeats_of(samples: Array) -> Repeats:
    """Medians and noise of `samples` (rows, repeats), NaN where nothing was measured.

    Rows without a measurement have the median NaN. Spreads are robust (medians of absolute
    differences), in logarithms, so that they are fractions and outliers do not count.
    """
    samples = np.asarray(samples, dtype=np.float64)
    counts = np.isfinite(samples).sum(axis=1)
    median = np.full(len(samples), np.nan)
    measured = counts > 0
    if measured.any():
        median[measured] = np.nanmedian(samples[measured], axis=1)
    logs = np.log(samples)
    # Differences within a row: unlike deviations from its median, few repeats do not shrink them.
    first, second = np.triu_indices(samples.shape[1], 1)
    apart = np.abs(logs[:, first] - logs[:, second])
    apart = apart[np.isfinite(apart)]
    sigma = float(np.median(apart)) / (_MAD_PER_SIGMA * 2**0.5) if apart.size else _UNKNOWN_SIGMA
    deviation = np.abs(logs - np.log(median)[:, None])
    typical = float(np.median(counts[measured])) if measured.any() else 1.0
    outliers = int(np.nansum(deviation > max(_OUTLIER_SIGMAS * sigma, _LEAST_FRACTION)).sum())
    floor = sigma * (_MEDIAN_PER_MEAN / typical**0.5 if typical > 2 else 1 / typical**0.5)
    return Repeats(median, Noise(sigma, floor, outliers, int(counts.sum())))


def threshold_fraction(floor_fraction: float, compared: int) -> float:
    """How much slower one of `compared` links must be to be called slow, as a fraction of time."""
    tail = NormalDist().inv_cdf(1 - _FALSE_ALARMS / max(compared, 1) / 2)
    logarithm = max(tail, _LEAST_SIGMAS) * floor_fraction
    return max(float(np.expm1(logarithm)), _LEAST_FRACTION)


def symmetrised(seconds: Array) -> Array:
    """The mean of both directions (n, n), in logarithms; one direction where only that is known."""
    logs = np.log(seconds)
    both = np.where(np.isfinite(logs) & np.isfinite(logs.T), (logs + logs.T) / 2, np.nan)
    return np.exp(np.where(np.isfinite(both), both, np.where(np.isfinite(logs), logs, logs.T)))


def asymmetry_fraction(seconds: Array) -> float:
    """The largest difference between the two directions of a link, as a fraction."""
    difference = np.abs(np.log(seconds) - np.log(seconds).T)
    found = difference[np.isfinite(difference)]
    return float(np.expm1(found.max())) if found.size else 0.0


@dataclass(frozen=True, slots=True)
class Slow:
    """How much longer than usual: `ends` are one rank or node, or the two of a link."""

    ends: tuple[int, ...]
    times_longer: float


def lasting_excess(seconds: Sequence[Array], kinds: NDArray[np.int64]) -> Array:
    """By how much (a logarithm) links are slower than usual, at every one of several sizes.

    `seconds` are (n, n) per size, symmetric, NaN where not measured. A link is compared with the
    median of those of its kind (`kinds`, the level where they meet, -1 to leave one out), and the
    least of its sizes counts: sizes are measured at different times, so that a burst of noise does
    not make a link slow.
    """
    least: Array = np.min([_excess(one, kinds) for one in seconds], axis=0)
    return least


def slow_ends_and_links(
    excess: Array, threshold: float
) -> tuple[tuple[Slow, ...], tuple[Slow, ...]]:
    """Which ends are slow to all their partners, and which links are slow beyond their ends.

    `excess` (n, n) is symmetric, NaN where a link does not count. An end is as slow as the median
    of its links, and what is left of a link after its slower end is the link's own; ends are found
    slowest first, so that one slow end does not colour its partners.
    """
    size = len(excess)
    of_end = np.zeros(size)
    for _ in range(size):
        rest = excess - np.maximum(of_end[:, None], of_end[None, :])
        rest[of_end > 0, :] = np.nan
        rest[:, of_end > 0] = np.nan
        medians = np.array([_low_median(row) for row in rest])
        if not np.isfinite(medians).any():
            break
        worst = int(np.nanargmax(medians))
        if np.expm1(medians[worst]) <= threshold:
            break
        # A slow link makes the median of both its ends high only where they have few others.
        if np.isfinite(rest[worst]).sum() < 2:
            break
        of_end[worst] = medians[worst]
    ends = [Slow((i,), float(np.exp(of_end[i]))) for i in range(size) if of_end[i] > 0]
    own = excess - np.maximum(of_end[:, None], of_end[None, :])
    links = [
        Slow((i, j), float(np.exp(excess[i, j])))
        for i in range(size)
        for j in range(i + 1, size)
        if np.isfinite(own[i, j]) and np.expm1(own[i, j]) > threshold
    ]
    return (
        tuple(sorted(ends, key=lambda s: -s.times_longer)),
        tuple(sorted(links, key=lambda s: -s.times_longer)),
    )


def _excess(seconds: Array, kinds: NDArray[np.int64]) -> Array:
    """Logarithm of the time over the usual time of the link's kind."""
    excess = np.full(seconds.shape, np.nan)
    off_diagonal = ~np.eye(len(seconds), dtype=bool)
    for kind in np.unique(kinds[off_diagonal]):
        chosen = (kinds == kind) & off_diagonal & np.isfinite(seconds)
        if kind >= 0 and chosen.any():
            excess[chosen] = np.log(seconds[chosen] / _low_median(seconds[chosen]))
    return excess


def _low_median(values: Array) -> float:
    """The median, the lower of the two middle values where they are two."""
    found = np.sort(values[np.isfinite(values)])
    return float(found[(len(found) - 1) // 2]) if len(found) else float("nan")


def padded(rows: list[list[float]]) -> Array:
    """Rows of unequal length as one array, NaN at their ends."""
    width = max((len(row) for row in rows), default=1)
    table = np.full((len(rows), width), np.nan)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
    return table
