"""Climbs the grid of cases within a time budget; all ranks of a team measure at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from statistics import geometric_mean, median

from ..efficiency import ComputeDtype, Direction, KernelClass
from ..ranks import Report, Team
from .cases import Case, levels
from .clock import Clock
from .host import host_s_per_call
from .operations import operation

KINDS: tuple[KernelClass, ...] = ("matmul", "attention", "normalisation", "pointwise", "copy")
_FINE_S = 30.0
"""With less time a coarser grid still reaches the large sizes."""
_RUNS = 3
"""What measuring a case costs at least, in its own time: twice to warm up, once in earnest."""
_MEMORY_FRACTION = 0.25
"""Of what is free: operands are made twice, and libraries keep work space."""

Key = tuple[KernelClass, ComputeDtype, Direction]


@dataclass(frozen=True, slots=True)
class Point:
    """One size of a curve: work of one kernel (FLOPs or bytes) and its seconds."""

    work: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Samples:
    """Everything measured on the device; `failed` says which kinds it cannot do, and why."""

    points: dict[Key, list[Point]]
    host_s_per_call: float
    failed: dict[Key, str]


@dataclass(slots=True)
class _Climb:
    """What one rank has measured, curve by curve."""

    clock: Clock
    points: dict[Key, list[Point]] = field(default_factory=dict)
    ended: set[Key] = field(default_factory=set)
    failed: dict[Key, str] = field(default_factory=dict)

    def expected_s(self, key: Key, cases: list[Case]) -> float:
        """What the next size will take at the rate of the last."""
        if key not in self.points:
            return 0.0
        last = self.points[key][-1]
        return sum(case.work(key[2]) / last.work * last.seconds for case in cases)

    def measure(self, key: Key, cases: list[Case], at_most_s: float) -> None:
        """Times the cases of one size: the point is their mean."""
        work, seconds = [], []
        for case in cases:
            try:
                call, kernels = operation(case, key[2], self.clock.device)
                taken = self.clock.seconds(call, at_most_s / len(cases))
            except (RuntimeError, AttributeError) as error:  # the device has no such kernel
                self.failed[key] = " ".join(str(error).split())[:120]
                return
            work.append(case.work(key[2]))
            seconds.append(taken / kernels)
        point = Point(geometric_mean(work), geometric_mean(seconds))
        self.points.setdefault(key, []).append(point)


def sampled(
    team: Team,
    dtypes: tuple[ComputeDtype, ...],
    budget_s: float,
    free_bytes: int,
    report: Report,
) -> Samples | None:
    """Measures all kinds of kernels in the dtypes, for `budget_s` seconds at most; the result is on
    rank 0 only, the median of the ranks'.

    Sizes that would take the rest of the time, or more than a quarter of `free_bytes`, are left
    out, with all larger ones of their curve.
    """
    deadline = time.monotonic() + budget_s
    climb = _Climb(Clock(team.device, team.world_size > 1))
    team.together()
    host_s = host_s_per_call(climb.clock)
    grid = [
        (cases, direction)
        for turn in levels(KINDS, dtypes, coarse=budget_s < _FINE_S)
        for cases in turn
        for direction in cases[0].directions
    ]

    def measure(key: Key, cases: list[Case], remaining: int) -> None:
        allowed_s = team.told(
            lambda: _allowed_s(
                climb, key, cases, deadline - time.monotonic(), free_bytes, remaining
            )
        )
        if allowed_s is None:
            climb.ended.add(key)
            return
        report(1 - (deadline - time.monotonic()) / budget_s, f"{key[0]} {key[1]}")
        team.together()
        climb.measure(key, cases, allowed_s)

    for done, (cases, direction) in enumerate(grid):
        measure((cases[0].kind, cases[0].dtype, direction), cases, len(grid) - done)
    rows = team.gathered((climb.points, host_s, climb.failed))
    return _merged(rows) if rows else None


def _allowed_s(
    climb: _Climb,
    key: Key,
    cases: list[Case],
    left_s: float,
    free_bytes: int,
    remaining: int,
) -> float | None:
    """How long to measure one size; None to leave it out.

    An even share of the time left, more where a single run of each shape takes more, but never
    more than a fifth of what is left.
    """
    if key in climb.ended or key in climb.failed or left_s <= 0:
        return None
    if max(case.memory_bytes for case in cases) > free_bytes * _MEMORY_FRACTION:
        return None
    expected_s = _RUNS * climb.expected_s(key, cases)
    if expected_s > left_s / 5:
        return None
    return max(left_s / max(remaining, 1), expected_s)


def _merged(rows: list[tuple[dict[Key, list[Point]], float, dict[Key, str]]]) -> Samples:
    """The median of the ranks, point by point."""
    failed = {key: text for _, _, texts in rows for key, text in texts.items()}
    points = {}
    for key, first in rows[0][0].items():
        count = min(len(found.get(key, ())) for found, _, _ in rows)
        points[key] = [
            Point(first[at].work, median(found[key][at].seconds for found, _, _ in rows))
            for at in range(count)
        ]
    points = {key: curve for key, curve in points.items() if curve}
    return Samples(points, median(host for _, host, _ in rows), failed)
