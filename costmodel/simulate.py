"""Event times of a schedule: when every action of a step starts and ends, and what is waited for.

A schedule table fixes the order of work on every rank; an action starts when the one before it on
its rank has ended and its input has arrived. That is a longest path through the table's
dependencies, followed wave by wave in numpy. Around the pipeline: gathering parameters, reducing
gradients, the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import InvalidInput
from ..ir.schedule import B, Ints, ScheduleTable, W
from .overlap import overlap_cost_fraction
from .timeline import Timeline

Array = NDArray[np.float64]

Transfer = Literal["overlapped", "blocking"]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds that one microbatch takes on each (virtual) stage, communication inside the stage
    that is not hidden included (`costmodel.overlap`).

    A full backward takes both halves: the gradient of the input and that of the weights.
    """

    forward_s: tuple[float, ...]
    backward_input_s: tuple[float, ...]
    backward_weight_s: tuple[float, ...]

    @staticmethod
    def of(
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        weight_share: float = 0.5,
    ) -> StageTimes:
        """Whole backwards, of which the weights' half takes `weight_share`: of a linear layer's two
        products one is for its input, one for its weight."""
        return StageTimes(
            tuple(forward_s),
            tuple((1 - weight_share) * seconds for seconds in backward_s),
            tuple(weight_share * seconds for seconds in backward_s),
        )

    def by_kind(self) -> Array:
        """Seconds as an array [kind of action, stage]."""
        forward, inputs, weights = map(
            np.asarray, (self.forward_s, self.backward_input_s, self.backward_weight_s)
        )
        return np.array([forward, inputs + weights, inputs, weights], np.float64)


@dataclass(frozen=True, slots=True)
class DataParallel:
    """Communication over the data-parallel group once per step, in seconds per (virtual) stage.

    `gradients_s` reduces a stage's gradients, in `buckets` equal parts: part j may leave when
    (j + 1) / buckets of the stage's last backward have run. `parameters_s` gathers a stage's
    updated parameters: `at_start` of the step, in parts again, each needed by the matching part of
    the stage's first forward (as Megatron-LM's overlapped gather); otherwise after the optimizer,
    exposed. Where `overlapped`, both run beside compute, one after the other on a rank, and slow
    it (`overlap.overlap_cost_fraction`); otherwise the rank stops for them.
    """

    gradients_s: tuple[float, ...]
    parameters_s: tuple[float, ...]
    buckets: int = 1
    overlapped: bool = True
    at_start: bool = False


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What surrounds the pipeline, and how its ranks send.

    `transfer`: `overlapped`, sends and receives run beside compute (asynchronous, receives posted
    early); `blocking`, a rank stands still while it sends and receives, both at once where both
    fall between the same two actions (Megatron-LM's send_forward_recv_backward).
    `optimizer_s`: seconds per rank; with `barrier` it starts when all ranks have their gradients
    (clipping takes the norm over all stages), otherwise on each rank by itself (Qi et al. 2023,
    arXiv:2401.10241, section 4).
    """

    transfer: Transfer = "overlapped"
    data_parallel: DataParallel | None = None
    optimizer_s: tuple[float, ...] | None = None
    barrier: bool = True


def simulate(
    table: ScheduleTable,
    times: StageTimes,
    p2p_s: Sequence[float],
    options: StepOptions | None = None,
) -> Timeline:
    """The exact timeline of a step.

    `p2p_s` are the seconds from a stage to the next, one fewer than there are (virtual) stages; the
    same on the way back, and none where both are on one rank. Exact for the table and the options;
    one thing is of first order: the slowdown of compute beside gradient and parameter traffic is
    added to the end of the rank that bears it and does not pass to other ranks. Raises InvalidInput
    for lengths that do not fit the table, and for negative or endless times.
    """
    options = options or StepOptions()
    transfers = _checked(table, times, p2p_s, options)
    sync = options.data_parallel
    released = _released(table, times, sync)
    start, end, waited = action_times(table, times, transfers, options.transfer, released)
    done = end[table.first[1:] - 1]
    if sync is not None:
        done = _gradients_end(table, sync, start, end)
    ready = np.full(table.pp, done.max()) if options.barrier else done
    if options.optimizer_s is not None:
        ready = ready + np.asarray(options.optimizer_s)
    if sync is not None and not sync.at_start:
        gathers = np.bincount(table.placement, sync.parameters_s, minlength=table.pp)
        ready = ready + gathers
    return Timeline(table, start, end, waited, done, ready)


def action_times(
    table: ScheduleTable,
    times: StageTimes,
    transfers: Array,
    transfer: Transfer,
    released: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Per action of the table: start, end, and the seconds its rank waited for a transfer.

    `transfers` in seconds from each stage to the next; `released` is the earliest start of the
    first forward of each stage.
    """
    order, stages = table.order, table.stages
    took = times.by_kind().ravel()[order.code]
    # on the way to an action: to F from the stage before, to B and I from the one after
    down, up, none = np.append(0.0, transfers), np.append(transfers, 0.0), np.zeros(stages)
    arriving = np.concatenate([down, up, up, none])[order.code]
    between = np.zeros(len(took))
    if transfer == "blocking":
        sent = np.append(0.0, np.concatenate([up, down, down, none])[order.code])
        between = np.where(order.before > 0, np.maximum(sent[order.before], arriving), 0.0)
    ends = _longest(table, took, between, arriving, released)
    start = ends[1:] - took
    waited = start - np.maximum(ends[order.before], ends[order.needs])
    if released is not None:  # waiting for parameters is not waiting for another stage
        waited = np.minimum(waited, np.maximum(between, arriving))
    result = np.empty((3, len(took)))
    result[:, order.actions] = start, ends[1:], np.maximum(0.0, waited)
    return result[0], result[1], result[2]


def _longest(
    table: ScheduleTable,
    took: Array,
    between: Array,
    arriving: Array,
    released: Array | None,
) -> Array:
    """The end of every action in order of the waves, after a 0 for the start of the step."""
    order, count = table.order, len(took)
    before_at, needs_at = order.slots
    lengths = np.empty(2 * count)
    lengths[before_at], lengths[needs_at] = took + between, took + arriving
    earliest = np.zeros(count)
    if released is not None:
        is_forward = np.flatnonzero(order.code < table.stages)
        _, first = np.unique(order.code[is_forward], return_index=True)
        earliest[is_forward[first]] = released
        earliest += took
    ends = np.zeros(count + 1)
    a, bounds = 0, order.bounds.tolist()
    for inputs, b in zip(order.inputs, bounds[1:], strict=True):
        width = b - a
        reached = ends.take(inputs)
        reached += lengths[2 * a : 2 * b]
        into = ends[a + 1 : b + 1]
        np.maximum(reached[:width], reached[width:], out=into)
        if released is not None:
            np.maximum(into, earliest[a:b], out=into)
        a = b
    return ends


def _released(table: ScheduleTable, times: StageTimes, sync: DataParallel | None) -> Array | None:
    """Per stage, when its parameters allow its first forward; None where they are there at once."""
    if sync is None or not sync.at_start:
        return None
    released = np.zeros(table.stages)
    for rank in range(table.pp):
        stages = table.stages_of(rank)
        gathered = 0.0
        for stage in stages:
            gather, forward = sync.parameters_s[stage], times.forward_s[stage]
            rest = 1 - 1 / sync.buckets
            # the last part of the forward runs after the last part has arrived
            released[stage] = gathered + max(gather - rest * gather, gather - rest * forward)
            gathered += gather
        if not sync.overlapped:
            released[list(stages)] = gathered
    return released


def _gradients_end(table: ScheduleTable, sync: DataParallel, start: Array, end: Array) -> Array:
    """Per rank, when its gradients are reduced."""
    result = np.empty(table.pp)
    loss = overlap_cost_fraction()
    for rank in range(table.pp):
        here = slice(table.first[rank], table.first[rank + 1])
        starts, ends, compute_end = start[here], end[here], float(end[here.stop - 1])
        stages = table.stages_of(rank)
        gathers = sum(sync.parameters_s[stage] for stage in stages) if sync.at_start else 0.0
        if not sync.overlapped:
            result[rank] = compute_end + sum(sync.gradients_s[stage] for stage in stages)
            continue
        free, hidden = gathers, _overlap(starts, ends, 0.0, gathers)
        for stage, i in _last_backwards(table.kind[here], table.stage[here]):
            seconds = sync.gradients_s[stage]
            part, step = seconds / sync.buckets, (ends[i] - starts[i]) / sync.buckets
            # with equal parts, the first or the last to become ready decides
            done = max(free + seconds, starts[i] + step + seconds, ends[i] + part)
            hidden += _overlap(starts, ends, done - seconds, done)
            free = done
        result[rank] = max(compute_end, free) + loss * hidden
    return result


def _last_backwards(kinds: Ints, stages: Ints) -> list[tuple[int, int]]:
    """A rank's stages and the positions of their last backwards among its actions, in order."""
    (done_at,) = np.nonzero((kinds == B) | (kinds == W))
    of_stage, from_end = np.unique(stages[done_at][::-1], return_index=True)
    positions = done_at[len(done_at) - 1 - from_end]
    order = np.argsort(positions)
    return list(zip(of_stage[order].tolist(), positions[order].tolist(), strict=True))


def _overlap(starts: Array, ends: Array, since: float, until: float) -> float:
    """Seconds of actions that lie in a stretch of time."""
    inside = np.minimum(ends, until) - np.maximum(starts, since)
    return float(inside[inside > 0].sum())


def _checked(
    table: ScheduleTable, times: StageTimes, p2p_s: Sequence[float], options: StepOptions
) -> Array:
    """The transfers between stages, none within a rank; raises InvalidInput for what cannot be."""
    sync, stages = options.data_parallel, table.stages
    lengths: list[tuple[str, Sequence[float], int]] = [
        ("forward_s", times.forward_s, stages),
        ("backward_input_s", times.backward_input_s, stages),
        ("backward_weight_s", times.backward_weight_s, stages),
        ("p2p_s", p2p_s, stages - 1),
    ]
    if sync is not None:
        lengths += [("gradients_s", sync.gradients_s, stages)]
        lengths += [("parameters_s", sync.parameters_s, stages)]
        if sync.buckets < 1:
            raise InvalidInput(f"buckets={sync.buckets}: expected at least 1")
    if options.optimizer_s is not None:
        lengths += [("optimizer_s", options.optimizer_s, table.pp)]
    for name, values, expected in lengths:
        if len(values) != expected:
            raise InvalidInput(
                f"{name} has {len(values)} values, expected {expected}: the schedule {table.name} "
                f"has {stages} stages on {table.pp} ranks"
            )
        array = np.asarray(values, np.float64)
        if not (np.isfinite(array).all() and (array >= 0).all()):
            worst = next(v for v in values if not 0 <= v < float("inf"))
            raise InvalidInput(f"{name} has {worst}: expected seconds, 0 or more")
    ranks = np.asarray(table.placement)
    return np.where(ranks[1:] == ranks[:-1], 0.0, np.asarray(p2p_s, np.float64))
