"""The pipeline master problem (`stage_problem`), solved to proven optimality.

For a pace T the most microbatches that each stage can hold in flight within T say on how few
devices the model can be covered (`stage_cover`), and the seconds of all frontiers' columns are the
only paces that matter: the least of them that can be covered is found by bisection. Frontiers may
be bounds (`stage_choices`), so the stages of that cover are then solved exactly; what they really
take replaces the bound where it is more, and the search goes on until a plan is as fast as the
bound.

Before frontiers are made, a plan whose layers all follow one rule (the fastest choice, the leanest)
says what pace is worth looking at, and few stages keep it: most take the devices that the other
layers need at least, by their seconds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..ir.errors import Infeasible
from .downsets import Array, Bools, Downsets, Ints
from .stage_choices import Frontiers, fastest_picks
from .stage_cover import Chosen, Moves, fewest_devices
from .stage_intervals import Intervals
from .stage_problem import Choice, Cut, StagePlan, StageProblem, plan_of, stage_seconds

_LESS = 1 - 1e-12
"""A plan that is faster by less is no faster."""
_LEAN = (2, 8, 64)
"""Microbatches in flight at which choices are the leanest, for a first plan."""


def best_stages(problem: StageProblem) -> StagePlan:
    """The plan whose slowest stage takes least: no plan is faster.

    Raises InvalidInput where the edges form a cycle, or are so far from a chain that there are more
    than `downsets.MOST` downsets; Infeasible, with what is short, where nothing fits.
    """
    edges = [(edge.source, edge.target) for edge in problem.edges]
    downsets = Downsets.of(len(problem.layers), edges)
    program = _Program(problem, downsets)
    best = program.leanest()
    if best is None:
        raise Infeasible(_shortage(problem, downsets))
    return program.best(program.ruled(best))


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """What keeps a pace: row and replicas (as `row * len(replicas) + place`), seconds, and the most
    microbatches in flight; in this order, more microbatches taking more seconds."""

    key: Ints
    seconds: Array
    in_flight: Ints

    @staticmethod
    def of(key: Ints, seconds: Array, in_flight: Ints) -> _Steps:
        """Steps in any order; those that others beat are left out."""
        order = np.lexsort((-in_flight, seconds, key))
        key, seconds, in_flight = key[order], seconds[order], in_flight[order]
        # Keys ascend, so a running maximum of both together starts anew with each.
        span = int(in_flight.max(initial=0)) + 1
        so_far = np.maximum.accumulate(key * span + in_flight)
        keep = np.append(True, so_far[1:] > so_far[:-1])[: len(key)]
        keep &= in_flight > 0
        return _Steps(key[keep], seconds[keep], in_flight[keep])

    def most_in_flight(self, pace_s: float, shape: tuple[int, int]) -> Ints:
        """[row, replicas]: the most microbatches in flight within a pace."""
        within = self.seconds <= pace_s
        last = within.copy()
        last[:-1] &= ~within[1:] | (self.key[1:] != self.key[:-1])
        found = np.zeros(shape[0] * shape[1], np.intp)
        found[self.key[last]] = self.in_flight[last]
        return found.reshape(shape)

    def at_least(self, key: int, in_flight: int, seconds: float) -> _Steps:
        """The same, knowing that so many microbatches or more take no less than `seconds`."""
        more = (self.key == key) & (self.in_flight >= in_flight)
        before = self.seconds[more].min(initial=np.inf)
        return _Steps.of(
            np.append(self.key, key),
            np.append(np.where(more, np.maximum(self.seconds, seconds), self.seconds), before),
            np.append(self.in_flight, in_flight - 1),
        )


class _Program:
    """The problem with its tables."""

    def __init__(self, problem: StageProblem, downsets: Downsets) -> None:
        self.problem, self.intervals = problem, Intervals.of(problem, downsets)
        self.most = min(problem.devices, problem.microbatches)
        every = np.arange(1, self.most + 1)
        self.replicas: Ints = every[problem.microbatches % every == 0]

    def leanest(self) -> StagePlan | None:
        """The plan on the fewest devices, however slow; None where nothing fits."""
        in_flight = self.intervals.most_in_flight(self.problem.memory_limit_bytes, self.most)
        every = np.repeat(in_flight[:, None], len(self.replicas), axis=1)
        chosen = self._cover(self.intervals, every)
        return (
            None if chosen is None else self._plan([self._cut(self.intervals, s) for s in chosen])
        )

    def ruled(self, best: StagePlan) -> StagePlan:
        """The best plan of those whose covers are found with choices that all follow one rule."""
        intervals, columns = self.intervals, []
        for weigh in (_seconds, *(_bytes_with(y) for y in _LEAN)):
            for amount in (_seconds, self._resync, _in_flight_bytes, _fixed_bytes):
                columns.append(intervals.sums(_of_least(amount, weigh)))
        every = np.array(columns).reshape(-1, 4, len(intervals))
        row = np.tile(np.arange(len(intervals)), len(every))
        steps = self._steps(intervals, row, np.concatenate(list(every), axis=1), best.seconds)
        found = self._least(intervals, steps, 0.0, best.seconds)
        plan = None if found is None else self._plan([self._cut(intervals, s) for s in found[1]])
        return best if plan is None or plan.seconds >= best.seconds else plan

    def best(self, best: StagePlan) -> StagePlan:
        """The best plan of all, given any."""
        worth = self._worth(self.intervals, best.seconds)
        intervals = self.intervals.only(np.nonzero(worth.any(axis=1))[0])
        frontiers = Frontiers(intervals, int(self.replicas[-1]), self.most, best.seconds)
        every = [frontiers.of(row) for row in range(len(intervals))]
        row = np.repeat(np.arange(len(every)), [each.shape[1] for each in every])
        columns = np.concatenate([np.zeros((4, 0)), *every], axis=1)
        steps = self._steps(intervals, row, columns, best.seconds)
        floor_s = 0.0
        while (found := self._least(intervals, steps, floor_s, best.seconds)) is not None:
            floor_s, chosen = found
            cuts = [self._cut(intervals, stage) for stage in chosen]
            plan = self._plan(cuts)
            if plan is not None and plan.seconds < best.seconds:
                best = plan
            for stage, cut in zip(chosen, cuts, strict=True):
                seconds = np.inf if cut is None else stage_seconds(self.problem, cut)
                if seconds > floor_s / _LESS:
                    place = int(np.searchsorted(self.replicas, stage.replicas))
                    key = stage.row * len(self.replicas) + place
                    steps = steps.at_least(key, stage.in_flight, seconds)
        return best

    def _least(
        self, intervals: Intervals, steps: _Steps, floor_s: float, below_s: float
    ) -> tuple[float, list[Chosen]] | None:
        """The least pace from `floor_s` on and below `below_s` that steps can be covered at, and
        how; None where there is none."""
        shape = (len(intervals), len(self.replicas))
        paces = steps.seconds[(steps.seconds >= floor_s) & (steps.seconds < below_s * _LESS)]
        paces, found = np.unique(paces), None
        low, high = 0, len(paces)
        while low < high:
            middle = (low + high) // 2
            pace = float(paces[middle])
            chosen = self._cover(intervals, steps.most_in_flight(pace, shape))
            if chosen is None:
                low = middle + 1
            else:
                high, found = middle, (pace, chosen)
        return found

    def _steps(self, intervals: Intervals, row: Ints, columns: Array, worth_s: float) -> _Steps:
        """The steps of columns of frontiers [4, n], each of a row, that are worth it."""
        seconds, resync, alive, fixed = columns
        room = self.problem.memory_limit_bytes
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.where(alive > 0, (room - fixed) / alive, np.where(fixed <= room, np.inf, 0))
        in_flight = np.clip(most, 0, self.most).astype(np.intp)
        in_flight += (in_flight < self.most) & (alive * (in_flight + 1) + fixed <= room)
        in_flight -= (in_flight > 0) & (alive * in_flight + fixed > room)
        d = self.replicas
        took = (seconds + intervals.cut_seconds[row])[:, None] / d + resync[:, None] * (1 - 1 / d)
        use = self._worth(intervals, worth_s)[row] & (took < worth_s) & (in_flight > 0)[:, None]
        column, place = np.nonzero(use)
        key = row[column] * len(d) + place
        return _Steps.of(key, took[column, place], in_flight[column])

    def _worth(self, intervals: Intervals, worth_s: float) -> Bools:
        """[row, replicas]: what could be a stage of a plan that takes less than `worth_s`.

        Its own seconds are no more, and the devices it leaves are enough for all other layers,
        each of which needs at least its seconds times degree over `worth_s`.
        """
        d, degree = self.replicas, intervals.degree[:, None]
        seconds = intervals.sums(_least_of(_seconds)) + intervals.cut_seconds
        resync = intervals.sums(_least_of(self._resync))
        took = seconds[:, None] / d + resync[:, None] * (1 - 1 / d)
        work = np.array([
            min(t * min(map(_seconds, choices)) for t, choices in layer.choices.items())
            for layer in self.problem.layers
        ])  # fmt: skip
        through = intervals.downsets.members @ work
        others = through[-1] - through[intervals.last] + through[intervals.first]
        left = self.problem.devices - others[:, None] / worth_s * (1 - 1e-9)
        fits = intervals.sums(_least_of(_bytes_with(1))) <= self.problem.memory_limit_bytes
        worth: Bools = (took <= worth_s * (1 + 1e-9)) & (degree * d <= left + 1e-9)
        return worth & fits[:, None]

    def _cover(self, intervals: Intervals, in_flight: Ints) -> list[Chosen] | None:
        moves = Moves.of(self.replicas, in_flight)
        return fewest_devices(intervals, moves, self.problem.devices, self.most)

    def _cut(self, intervals: Intervals, stage: Chosen) -> Cut | None:
        layers, degree = intervals.layers(stage.row), int(intervals.degree[stage.row])
        picks = fastest_picks(self.problem, layers, degree, stage.replicas, stage.in_flight)
        return None if picks is None else Cut(layers, degree, stage.replicas, picks)

    def _plan(self, cuts: Sequence[Cut | None]) -> StagePlan | None:
        """The plan of some stages; None where one of them does not fit."""
        known = [cut for cut in cuts if cut is not None]
        return plan_of(self.problem, known) if len(known) == len(cuts) else None

    def _resync(self, choice: Choice) -> float:
        problem = self.problem
        rate = problem.microbatches * problem.bandwidth_bytes_per_s
        return 4 * choice.parameter_bytes / rate


_Amount = Callable[[Choice], float]


def _seconds(choice: Choice) -> float:
    return choice.seconds_per_sample


def _in_flight_bytes(choice: Choice) -> float:
    return choice.in_flight_bytes


def _fixed_bytes(choice: Choice) -> float:
    return choice.fixed_bytes


def _bytes_with(in_flight: int) -> _Amount:
    """The bytes of a choice with so many microbatches in flight."""
    return lambda choice: choice.in_flight_bytes * in_flight + choice.fixed_bytes


def _least_of(amount: _Amount) -> Callable[[Sequence[Choice]], float]:
    return lambda choices: min(map(amount, choices))


def _of_least(amount: _Amount, weigh: _Amount) -> Callable[[Sequence[Choice]], float]:
    """An amount of the choice that weighs least."""
    return lambda choices: amount(min(choices, key=weigh))


def _shortage(problem: StageProblem, downsets: Downsets) -> str:
    """What is short, where no plan fits: memory with these devices, devices with this memory."""
    limit, devices = problem.memory_limit_bytes, problem.devices
    given = f"{devices:,} devices of {limit:,.0f} bytes each"

    def leanest(limit_bytes: float, devices: int) -> StagePlan | None:
        asked = replace(problem, memory_limit_bytes=limit_bytes, devices=devices)
        return _Program(asked, downsets).leanest()

    unlimited = problem.microbatches * max(t for x in problem.layers for t in x.choices)
    more = leanest(limit, unlimited)
    if more is None:
        enough = "no number of devices would do with so much memory"
    else:
        enough = f"with so much memory {more.devices:,} devices would do"
    plan = leanest(math.inf, devices)
    if plan is None and leanest(math.inf, unlimited) is None:
        return (
            f"no plan fits {given}: no degrees of tensor parallelism that the layers know cut them "
            f"into at most {problem.microbatches:,} stages; expected layers that share degrees"
        )
    if plan is None:
        return f"no plan fits {given}, whatever their memory: devices are short; {enough}"
    low, high = limit, max(stage.memory_bytes for stage in plan.stages)
    while high - low > 1:
        plan = leanest((low + high) / 2, devices)
        if plan is None:
            low = (low + high) / 2
        else:
            high = max(stage.memory_bytes for stage in plan.stages)
    return (
        f"no plan fits {given}: memory is {math.ceil(high) - limit:,.0f} bytes short, on as many "
        f"devices {math.ceil(high):,} bytes would do; {enough}"
    )
