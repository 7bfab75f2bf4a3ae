"""Scores: errors of iteration times, choice within groups, memory. Fractions throughout."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan

import numpy as np
from scipy.stats import kendalltau

SMALLEST_GROUP = 3
"""Runs of a group that is ranked: with two, Kendall's tau is the toss of a coin."""


@dataclass(frozen=True, slots=True)
class ErrorScore:
    """Absolute relative errors of predicted against measured; `bias` is the signed median."""

    rows: int
    median_ape: float
    mean_ape: float
    p90_ape: float
    bias: float


def error_score(predicted: Sequence[float], measured: Sequence[float]) -> ErrorScore | None:
    """None where there are no rows."""
    if not measured:
        return None
    signed = np.asarray(predicted) / np.asarray(measured) - 1
    errors = np.abs(signed)
    return ErrorScore(
        rows=len(errors),
        median_ape=float(np.median(errors)),
        mean_ape=float(errors.mean()),
        p90_ape=float(np.quantile(errors, 0.9)),
        bias=float(np.median(signed)),
    )


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """How well predictions choose among runs of a group that differ in configuration.

    `kendall` is the mean over groups of tau-b (0 where all predictions are equal). A regret says
    how much slower than the best the favourite is; `random_regret` that of any run of the group.
    """

    groups: int
    rows: int
    kendall: float
    mean_regret: float
    max_regret: float
    random_regret: float


def choice_score(
    runs: Iterable[tuple[Hashable, float, float]], smallest: int = SMALLEST_GROUP
) -> ChoiceScore | None:
    """`runs`: (group, predicted seconds, measured seconds). None where no group has `smallest`."""
    groups: dict[Hashable, list[tuple[float, float]]] = {}
    for group, predicted, measured in runs:
        groups.setdefault(group, []).append((predicted, measured))
    ranked = [pairs for pairs in groups.values() if len(pairs) >= smallest]
    if not ranked:
        return None
    taus = [kendall(*zip(*pairs, strict=True)) for pairs in ranked]
    regrets = [regret(*zip(*pairs, strict=True)) for pairs in ranked]
    random = [
        float(np.mean([y for _, y in pairs])) / min(y for _, y in pairs) - 1 for pairs in ranked
    ]
    return ChoiceScore(
        groups=len(ranked),
        rows=sum(map(len, ranked)),
        kendall=float(np.mean(taus)),
        mean_regret=float(np.mean(regrets)),
        max_regret=max(regrets),
        random_regret=float(np.mean(random)),
    )


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Kendall's tau-b; 0 where one side is constant and says nothing."""
    tau = float(kendalltau(predicted, measured).statistic)
    return 0.0 if isnan(tau) else tau


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """How much slower the favourite is than the best; equal favourites count with their mean."""
    least = min(predicted) * (1 + 1e-9)
    favourites = [y for x, y in zip(predicted, measured, strict=True) if x <= least]
    return float(np.mean(favourites)) / min(measured) - 1


@dataclass(frozen=True, slots=True)
class MemoryScore:
    """Errors of memory where it was measured, and the classification of what ran and what did not.

    `false_oom` is the share of runs that ran, on GPUs of known memory, and are said not to fit.
    `median_ape_with_overhead` has one constant added, fitted on the other half of the groups;
    `overhead_gib` are the constants of the two halves.
    """

    rows: int
    median_ape: float | None
    bias: float | None
    oom_caught: int
    oom_total: int
    ran: int
    false_oom: float | None
    median_ape_with_overhead: float | None
    overhead_gib: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One row for `memory_score`: GiB (None: not measured, or not predicted), whether it is said to
    fit, whether it ran out of memory, whether it ran on GPUs of known memory."""

    group: str
    predicted_gib: float | None
    measured_gib: float | None
    fits: bool
    oom: bool
    ran: bool


def memory_score(rows: Sequence[MemoryRow]) -> MemoryScore | None:
    """None where no row says anything about memory."""
    both = [
        (row.group, row.predicted_gib, row.measured_gib)
        for row in rows
        if row.predicted_gib is not None and row.measured_gib is not None
    ]
    oom = [row for row in rows if row.oom]
    ran = [row for row in rows if row.ran and not row.oom]
    if not both and not oom and not ran:
        return None
    errors = error_score([p for _, p, _ in both], [m for _, _, m in both])
    overheads, left = cross_fitted_offsets(both)
    corrected = error_score([p for p, _ in left], [m for _, m in left])
    return MemoryScore(
        rows=len(both),
        median_ape=errors.median_ape if errors else None,
        bias=errors.bias if errors else None,
        oom_caught=sum(not row.fits for row in oom),
        oom_total=len(oom),
        ran=len(ran),
        false_oom=sum(not row.fits for row in ran) / len(ran) if ran else None,
        median_ape_with_overhead=corrected.median_ape if corrected else None,
        overhead_gib=overheads,
    )


def halves(groups: Iterable[str]) -> Mapping[str, int]:
    """Each group's half: groups by name, every other one."""
    return {group: i % 2 for i, group in enumerate(sorted(set(groups)))}


def cross_fitted_offsets(
    rows: Sequence[tuple[str, float, float]],
) -> tuple[tuple[float, ...], list[tuple[float, float]]]:
    """One additive constant, fitted on one half of the groups and applied to the other, both ways.

    `rows`: (group, predicted, measured). Returns the constants of the two halves, and (predicted +
    constant of the other half, measured) of all rows; both empty where there is one group only.
    """
    half = halves(group for group, _, _ in rows)
    residuals: tuple[list[float], list[float]] = ([], [])
    for group, predicted, measured in rows:
        residuals[half[group]].append(measured - predicted)
    if not (residuals[0] and residuals[1]):
        return (), []
    offsets = tuple(float(np.median(each)) for each in residuals)
    return offsets, [(p + offsets[1 - half[group]], m) for group, p, m in rows]
