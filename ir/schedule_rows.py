"""The tables of the known schedules: GPipe, 1F1B, interleaved 1F1B, ZB-H1 and ZB-V.

The orders are those of torch.distributed.pipelining, which emitted programs run; the tests compare
them action by action. All but ZB-V follow one pattern: a rank runs some forwards to warm up, then
forwards and backwards in turn, then the backwards that are left; with halves, weight gradients
follow the backwards at a fixed distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .errors import InvalidInput
from .plan import ScheduleName
from .schedule import B, F, I, Ints, ScheduleTable, W

Row = tuple[Ints, Ints, Ints]
"""Kinds, stages and microbatches of a rank's actions."""


def schedule_table(
    name: ScheduleName, pp: int, microbatches: int, vpp: int | None = None
) -> ScheduleTable:
    """The table of a schedule on `pp` ranks with `vpp` virtual stages each (default: the
    schedule's own, 1 or ZB-V's 2).

    - `gpipe`: all forwards, then all backwards in the same order (Huang et al. 2019,
      arXiv:1811.06965). torch: ScheduleGPipe.
    - `1f1b`: PipeDream-Flush (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1), as in
      Megatron-LM. torch: Schedule1F1B, which wants microbatches >= pp; here a rank's warm-up is cut
      to what there is, as Megatron-LM does.
    - `interleaved`: the same paper, section 2.2.2; stage s on rank s mod pp. Megatron-LM wants
      microbatches to be a multiple of pp; as in torch's ScheduleInterleaved1F1B they need only be
      a multiple of the rounds, max(1, microbatches // pp).
    - `zb-h1`: weight gradients delayed until as many microbatches are held as by the first rank of
      1F1B (Qi et al. 2023, arXiv:2401.10241, section 2.1). torch: ScheduleInterleavedZeroBubble,
      also with several virtual stages.
    - `zb-v`: two virtual stages, up and down the ranks (Qi et al. 2024, arXiv:2405.15362; there
      V-ZB). torch: ScheduleZBVZeroBubble.

    Raises InvalidInput for an unknown name or numbers that the schedule cannot take.
    """
    return _table(name, pp, microbatches, default_vpp(name) if vpp is None else vpp)


def schedule_placement(
    name: ScheduleName, pp: int, microbatches: int, vpp: int | None = None
) -> tuple[int, ...]:
    """The rank of every virtual stage; arguments and errors as `schedule_table`."""
    vpp = default_vpp(name) if vpp is None else vpp
    _check(name, pp, microbatches, vpp)
    if name == "zb-v":
        return (*range(pp), *reversed(range(pp)))
    return tuple(range(pp)) * vpp


def default_vpp(name: ScheduleName) -> int:
    """Virtual stages per rank where none are given."""
    return 2 if name == "zb-v" else 1


@lru_cache(maxsize=64)
def _table(name: ScheduleName, pp: int, microbatches: int, vpp: int) -> ScheduleTable:
    placement = schedule_placement(name, pp, microbatches, vpp)
    if name == "zb-v":
        rows = [_v_row(pp, microbatches, rank) for rank in range(pp)]
    else:
        rows = [_row(name, pp, microbatches, vpp, rank) for rank in range(pp)]
    kind, stage, microbatch = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    first = np.cumsum([0, *(len(row[0]) for row in rows)])
    return ScheduleTable(name, pp, vpp, microbatches, placement, first, kind, stage, microbatch)


def _check(name: str, pp: int, microbatches: int, vpp: int) -> None:
    for what, value in (("pp", pp), ("microbatches", microbatches), ("vpp", vpp)):
        if value < 1:
            raise InvalidInput(f"schedule={name}: {what}={value}, expected at least 1")
    match name:
        case "gpipe" | "1f1b":
            if vpp != 1:
                raise InvalidInput(
                    f"schedule={name}: vpp={vpp}, expected 1; schedule=interleaved takes more"
                )
        case "interleaved" | "zb-h1":
            if name == "interleaved" and vpp == 1:
                raise InvalidInput("schedule=interleaved: vpp=1, expected at least 2")
            rounds = max(1, microbatches // pp)
            if vpp > 1 and microbatches % rounds:
                raise InvalidInput(
                    f"schedule={name}: {microbatches} microbatches do not divide into {rounds} "
                    f"rounds of about pp={pp}; a multiple of {pp} does"
                )
        case "zb-v":
            if vpp != 2:
                raise InvalidInput(f"schedule=zb-v: vpp={vpp}, expected 2")
        case _:
            raise InvalidInput(
                f"schedule={name}, expected one of gpipe, 1f1b, interleaved, zb-h1, zb-v"
            )


def _row(name: str, pp: int, microbatches: int, vpp: int, rank: int) -> Row:
    """A row of the common pattern."""
    total = vpp * microbatches
    per_round = microbatches // max(1, microbatches // pp) if vpp > 1 else microbatches
    number = np.arange(total)
    chunk = (number // per_round) % vpp  # microbatches of a round pass one stage after another
    microbatch = number // (per_round * vpp) * per_round + number % per_round
    behind = pp - 1 - rank
    match name:
        case "gpipe":
            warm_up, delay = total, None
        case "1f1b":
            warm_up, delay = behind, None
        case "interleaved":
            warm_up, delay = (vpp - 1) * per_round + 2 * behind, None
        case _:
            warm_up, delay = (vpp - 1) * per_round + behind, rank
    warm_up = min(warm_up, total)
    forward, backward = chunk * pp + rank, (vpp - 1 - chunk) * pp + rank
    # An action's turn: forwards 0, 1, …; backward 0 right after forward `warm_up`; and so on.
    kinds, turns = [np.full(total, F)], [3 * number]
    stages, microbatches_ = [forward, backward], [microbatch, microbatch]
    kinds.append(np.full(total, B if delay is None else I))
    turns.append(3 * (number + warm_up) + 1)
    if delay is not None:
        kinds.append(np.full(total, W))
        turns.append(3 * (number + warm_up + delay) + 2)
        stages.append(backward)
        microbatches_.append(microbatch)
    order = np.argsort(np.concatenate(turns), kind="stable")
    return (
        np.concatenate(kinds)[order],
        np.concatenate(stages)[order],
        np.concatenate(microbatches_)[order],
    )


def _v_row(pp: int, microbatches: int, rank: int) -> Row:
    """A row of ZB-V, phase by phase, for at least the 2·pp - 1 microbatches that fill the pipeline;
    those that there are not are left out."""
    count = max(2 * pp - 1, microbatches)
    down, up = rank, 2 * pp - 1 - rank  # the rank's two stages
    behind = pp - rank
    early, steady = 2 * pp - 1 - rank, count - pp  # forwards of `down` before, turns of, steady
    first, last = count - pp, count - rank  # backwards of `down`, of `up`, after the steady phase
    phases = [
        _cycle([(F, down, 0)], 2 * behind - 1),
        _cycle([(F, up, 0), (F, down, 2 * behind - 1)], rank),
        _cycle([(F, up, rank), (I, up, 0), (W, up, 0)], behind),
        _cycle(
            [
                (F, down, early), (I, down, 0), (W, down, 0),
                (F, up, pp), (I, up, behind), (W, up, behind),
            ],
            steady,
        ),
        _cycle([(I, down, first), (I, up, last)], rank),
        _cycle([(I, down, first + rank), (W, down, first)], behind),
        _cycle([(W, up, last)], rank),
        _cycle([(W, down, first + behind)], rank),
    ]  # fmt: skip
    kind, stage, microbatch = (np.concatenate(parts) for parts in zip(*phases, strict=True))
    exists = microbatch < microbatches
    return kind[exists], stage[exists], microbatch[exists]


def _cycle(actions: Sequence[tuple[int, int, int]], times: int) -> Row:
    """Kind, stage and first microbatch of actions that take turns, `times` over."""
    kinds, stages, starts = np.array(actions, np.intp).T
    microbatch = starts + np.arange(times)[:, None]
    return np.tile(kinds, times), np.tile(stages, times), microbatch.ravel()
