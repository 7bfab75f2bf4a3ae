"""What a pipeline takes without simulating all of it: a bound for every schedule, and estimates.

Stages `s = 0 … p-1` take `f_s` forward and `B_s` backward, `T_s` together, per microbatch; a
backward may be halved into `b_s` (input) and `w_s` (weights); passing an activation from stage `s`
to `s+1` takes `c_s`, and so does its gradient on the way back; `m` microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import InvalidInput
from ..ir.plan import ScheduleName
from ..ir.schedule_rows import default_vpp, schedule_placement, schedule_table
from .simulate import StageTimes, StepOptions, Transfer, simulate

Array = NDArray[np.float64]

FORWARD_SHARE = 1 / 3
"""Forward's part of a microbatch's time: a contraction's backward pass is two products of three."""

STEADY_ROUNDS = 5
"""Rounds (of about as many microbatches as ranks) after which each further one adds the same time,
to within 5 % of the whole (`benchmarks/schedules.py`)."""


def schedule_bound_seconds(
    schedule: ScheduleName,
    times: StageTimes,
    p2p_s: Sequence[float],
    microbatches: int,
    vpp: int | None = None,
) -> float:
    """The schedule takes at least this long; whatever surrounds or slows it only adds to it.

    For every rank, with s its lowest (virtual) stage: before its first action, which is a forward,
    an activation has passed the stages below s: `Σ_{i<s} (f_i + c_i)`. Then it works m times what
    its stages take. Where backwards are whole its last action is one, and its gradient passes all
    stages below s again: `Σ_{i<s} (B_i + c_i)`; together, with one stage per rank, that is
    `pipeline_bound_seconds`. Where they are halved, a weight gradient may be last, and nothing
    follows; or, leaving out the rank's weight gradients, its last input gradient passes the stages
    below, `Σ_{i<s} (b_i + c_i)`, and stage 0 makes its weight gradient, w_0. For any schedule, one
    microbatch passes all stages and comes back. For GPipe, whose forwards and backwards are two
    flow shops of equal jobs one after the other: `Σ (T + 2c) + (m-1)·(max f + max B)`, its time.

    Arguments and errors as `schedule_estimate_seconds`.
    """
    placement, transfers = _placed(schedule, times, p2p_s, microbatches, vpp)
    forward, inputs, weights = (
        np.asarray(x) for x in (times.forward_s, times.backward_input_s, times.backward_weight_s)
    )
    backward = inputs + weights
    if schedule == "gpipe":
        slowest = float(forward.max() + backward.max())
        return (
            float((forward + backward).sum() + 2 * transfers.sum()) + (microbatches - 1) * slowest
        )
    halved = schedule in ("zb-h1", "zb-v")
    returned = inputs if halved else backward
    reach, leave = _before(forward, transfers), _before(returned, transfers)
    ranks, lowest = np.unique(placement, return_index=True)
    work = np.bincount(placement, forward + backward, minlength=len(ranks))
    chain = float((forward + returned).sum() + 2 * transfers.sum())
    if not halved:
        rank_s = reach[lowest] + microbatches * work + leave[lowest]
        return max(chain, float(rank_s.max()))
    critical = np.bincount(placement, forward + inputs, minlength=len(ranks))
    stays = reach[lowest] + microbatches * work
    returns = reach[lowest] + microbatches * critical + leave[lowest] + weights[0]
    return max(chain + float(weights[0]), float(np.maximum(stays, returns).max()))


def schedule_estimate_seconds(
    schedule: ScheduleName,
    times: StageTimes,
    p2p_s: Sequence[float],
    microbatches: int,
    vpp: int | None = None,
    transfer: Transfer = "overlapped",
) -> float:
    """What the schedule takes, nearly, without a full simulation.

    GPipe: the bound, which is exact. 1F1B: `pipeline_estimate_seconds`. Others, and transfers that
    block: few rounds are simulated, exactly; of more, STEADY_ROUNDS and one fewer are, and every
    later microbatch adds what those of the last round added. `benchmarks/schedules.py` shows the
    error of each schedule.

    `times` and `p2p_s` per (virtual) stage as `costmodel.simulate` takes them. Raises InvalidInput
    where lengths do not fit, or the schedule cannot take the numbers.
    """
    if transfer == "overlapped" and schedule == "gpipe":
        return schedule_bound_seconds(schedule, times, p2p_s, microbatches, vpp)
    placement, transfers = _placed(schedule, times, p2p_s, microbatches, vpp)
    if transfer == "overlapped" and schedule == "1f1b":
        forward = np.asarray(times.forward_s)
        backward = np.asarray(times.backward_input_s) + np.asarray(times.backward_weight_s)
        return _one_forward_one_backward(forward, backward, transfers, microbatches)
    pp = int(placement.max()) + 1
    options = StepOptions(transfer)

    def simulated(count: int) -> float:
        table = schedule_table(schedule, pp, count, len(placement) // pp)
        return simulate(table, times, p2p_s, options).step_s

    per_round = microbatches // max(1, microbatches // pp)
    few = STEADY_ROUNDS * per_round
    if microbatches <= 2 * few - per_round:  # no more than the two short simulations together
        return simulated(microbatches)
    reached = simulated(few)
    pace_s = (reached - simulated(few - per_round)) / per_round
    return reached + (microbatches - few) * pace_s


def least_passes(pp: int, microbatches: int, forward_share: float = FORWARD_SHARE) -> float:
    """1F1B and GPipe take at least so many times what one microbatch takes through all stages,
    however the stages are cut.

    Rank 0 of 1F1B has at most pp microbatches in flight, so that every pp microbatches something
    passes all stages there and back: of m > pp the first takes `ΣT`, each further round of pp as
    much, and what is left the slowest stage, which is no faster than the average:
    `(m + pp - 1) / pp`, what equal stages take. With m = pp there is no full round: the last
    stage's loop leaves out stage 0 (`2·ΣT - T_0`), which by itself takes
    `ΣT + (m - 1 - share·(pp - 1))·T_0` (`least_paces`); both are equal where the larger is least.
    `tests/test_pipeline_seconds.py` compares with the estimate over all cuts: within 2 %.
    """
    if pp == 1 or microbatches > pp or microbatches < pp:
        return max(1.0, (microbatches + pp - 1) / pp if microbatches >= pp else 1.0)
    alone = microbatches - 1 - forward_share * (pp - 1)
    return 1 + alone / (1 + alone)


def least_paces(pp: int, microbatches: int, forward_share: float = FORWARD_SHARE) -> Array:
    """[pp]: a step of 1F1B takes at least `ΣT` and so many times what stage s takes.

    The first microbatch passes all stages and comes back; then stage s has m - 1 backwards left and
    m - 1 forwards but those, at most pp - 1 - s, that it ran meanwhile.
    """
    warm_up = np.minimum(microbatches - 1, pp - 1 - np.arange(pp))
    return np.asarray(microbatches - 1 - forward_share * warm_up)


def halved_paces(pp: int, microbatches: int, forward_share: float, weight_share: float) -> Array:
    """[pp]: a step of ZB-H1 takes at least `(1 - weight_share)·ΣT` and so many times what stage s
    takes, `weight_share` being the part of T that makes gradients of weights.

    As `least_paces`, with whatever waits for no other stage left out: the first microbatch passes
    all stages and its gradient comes back to stage s, whose last input gradient then passes the
    stages below. Meanwhile stage s runs all its work but the forwards of its warm-up and the s
    gradients of weights that it holds back (`ir.schedule_rows`). Equal stages reach it.
    """
    stages = np.arange(pp)
    warm_up = np.minimum(microbatches - 1, pp - 1 - stages)
    held_back = np.minimum(microbatches - 1, stages)
    return np.asarray(
        microbatches - 1 - forward_share * warm_up - weight_share * held_back, np.float64
    )


def pipeline_bound_seconds(
    stage_s: Sequence[float], p2p_s: Sequence[float], microbatches: int
) -> float:
    """No synchronous schedule with whole backwards and one stage per rank is faster: max over s of
    `m·T_s + Σ_{i<s} (T_i + 2·c_i)`.

    Stage s works m·T_s; before its first forward an activation has passed every stage before it,
    and after its last backward a gradient passes them again. Reached by 1F1B for equal stages
    without p2p. `stage_s` and `p2p_s` in seconds, one p2p fewer than stages. Raises InvalidInput
    where lengths or counts do not fit.
    """
    _check(stage_s, p2p_s, microbatches)
    stages, transfers = np.asarray(stage_s, np.float64), np.asarray(p2p_s, np.float64)
    return float((microbatches * stages + _before(stages, 2 * transfers)).max())


def pipeline_estimate_seconds(
    stage_s: Sequence[float],
    p2p_s: Sequence[float],
    microbatches: int,
    forward_share: float = FORWARD_SHARE,
) -> float:
    """What non-interleaved 1F1B takes, nearly: never below the bound, never above the simulation.

    Equal stages without p2p: exactly `(m + p - 1)·T` (Narayanan et al. 2021, arXiv:2104.04473,
    section 2.2). Arguments and errors as `pipeline_bound_seconds`; `forward_share` is the forward's
    part of T.
    """
    _check(stage_s, p2p_s, microbatches)
    stages, transfers = np.asarray(stage_s, np.float64), np.asarray(p2p_s, np.float64)
    forward = forward_share * stages
    return _one_forward_one_backward(forward, stages - forward, transfers, microbatches)


def _one_forward_one_backward(f: Array, b: Array, c: Array, microbatches: int) -> float:
    """The longest of a family of paths through the dependencies of 1F1B.

    A step takes as long as its longest path, so each path is a bound. A path here comes to stage t
    and its first backward: F passes stages 0 … t and climbs on to some stage u >= t, where the
    forwards of the warm-up run (or at a slower stage on the way), and B comes back to t. Then it
    loops, down from t to some s <= t and up again: F and B of the stages s … t and their transfers,
    twice, in which t - s + 1 microbatches pass (a round trip bounds the pace: no more are in flight
    between s and t). What is left of the microbatches passes the slowest of these stages. The end
    mirrors the start. All s, t and u at once.
    """
    stages = len(f)
    index = np.arange(stages)
    warm_up = np.minimum(microbatches - 1, stages - 1 - index)
    there = index[:, None] <= index  # [s, t]: the range s … t exists
    length = np.where(there, index - index[:, None] + 1, 1)
    passed = np.append(0.0, np.cumsum(f + b))
    sent = np.append(0.0, np.cumsum(c))
    trip = (passed[1:] - passed[:-1, None]) + 2 * (sent - sent[:, None])

    climb = np.where(there, trip - (f + b)[:, None], -np.inf)  # from F of s to B of s, by way of t
    fill, drain = warm_up * np.maximum.accumulate(f), warm_up * np.maximum.accumulate(b)
    reach, leave = np.cumsum(f) + sent, np.cumsum(b) + sent
    start, end = reach + (climb + fill).max(axis=1), leave + (climb + drain).max(axis=1)

    steady = microbatches - 1 - warm_up
    loops = steady // length
    slowest = np.where(there, (f + b)[:, None], -np.inf)
    slowest = np.maximum.accumulate(slowest[::-1], axis=0)[::-1]
    possible = there & ((loops > 0) | (length == 1))
    left = np.where(possible, (steady - loops * length) * np.where(possible, slowest, 0.0), 0.0)
    middle = np.where(possible, loops * trip + left, -np.inf).max(axis=0)
    # without a steady phase, start and end overlap: only one of them can climb
    short = np.maximum(start + drain + leave, reach + fill + end)
    return float(np.where(steady > 0, start + middle + end, short).max())


def _before(stage_s: Array, transfers: Array) -> Array:
    """Per stage, what the stages before it and the transfers up to it take."""
    return np.append(0.0, np.cumsum(stage_s[:-1] + transfers))


def _placed(
    schedule: ScheduleName,
    times: StageTimes,
    p2p_s: Sequence[float],
    microbatches: int,
    vpp: int | None,
) -> tuple[NDArray[np.intp], Array]:
    """The rank of every (virtual) stage and the seconds between them, none within a rank."""
    stages = len(times.forward_s)
    _check(times.forward_s, p2p_s, microbatches)
    per_rank = default_vpp(schedule) if vpp is None else vpp
    if per_rank < 1 or stages % per_rank:
        raise InvalidInput(f"{stages} stages on ranks with vpp={per_rank}: expected a multiple")
    pp = stages // per_rank
    placement = np.asarray(schedule_placement(schedule, pp, microbatches, per_rank), np.intp)
    transfers = np.asarray(p2p_s, np.float64)
    return placement, np.where(placement[1:] == placement[:-1], 0.0, transfers)


def _check(stage_s: Sequence[float], p2p_s: Sequence[float], microbatches: int) -> None:
    if not stage_s or len(p2p_s) != len(stage_s) - 1:
        raise InvalidInput(
            f"pipeline of {len(stage_s)} stages with {len(p2p_s)} transfers between them: expected "
            "one transfer fewer than stages"
        )
    if microbatches < 1:
        raise InvalidInput(f"{microbatches} microbatches: expected at least 1")
