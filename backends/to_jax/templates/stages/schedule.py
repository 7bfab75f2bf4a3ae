"""The order of work: which microbatch of which stage runs forward or backward, and when.

Stage s is on pipeline rank s mod pp. Every rank has a row of actions; a *wave* has those that can
run at the same time, at most one on each rank.

    gpipe        all forwards, then all backwards (Huang et al. 2019, arXiv:1811.06965)
    1f1b         a rank holds at most as many microbatches as there are stages from it to the last
                 (Narayanan et al. 2021, arXiv:2104.04473, section 2.2.1)
    interleaved  several stages on each rank, in rounds of about pp microbatches (section 2.2.2)
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """A pass of a microbatch through a stage: forward ("F") or backward ("B")."""

    kind: str
    stage: int
    microbatch: int


def row(schedule: str, pp: int, stages: int, microbatches: int, rank: int) -> list[Action]:
    """What a rank does, in order: forwards to warm up, forwards and backwards in turn, the rest."""
    here = stages // pp
    round_of = microbatches // max(1, microbatches // pp) if here > 1 else microbatches

    def passed(number: int) -> tuple[int, int]:
        """(which of the rank's stages, microbatch) of its forward of this number."""
        first = number // (round_of * here) * round_of
        return number // round_of % here, first + number % round_of

    total, behind = here * microbatches, pp - 1 - rank
    warm_up = {
        "gpipe": total,
        "1f1b": behind,
        "interleaved": (here - 1) * round_of + 2 * behind,
    }[schedule]
    warm_up = min(warm_up, total)
    actions = []
    for turn in range(total + warm_up):
        if turn < total:
            own, microbatch = passed(turn)
            actions.append(Action("F", own * pp + rank, microbatch))
        if turn >= warm_up:
            own, microbatch = passed(turn - warm_up)
            actions.append(Action("B", (here - 1 - own) * pp + rank, microbatch))
    return actions


def waves(schedule: str, pp: int, stages: int, microbatches: int) -> list[list[Action]]:
    """All actions: those of a wave take what earlier waves made."""
    rows = [row(schedule, pp, stages, microbatches, rank) for rank in range(pp)]
    done: set[Action] = set()
    found: list[list[Action]] = []
    while any(rows):
        wave = [own[0] for own in rows if own and _needs(own[0], stages) in {None, *done}]
        for action in wave:
            rows[action.stage % pp].pop(0)
        done.update(wave)
        found.append(wave)
    return found


def _needs(action: Action, stages: int) -> Action | None:
    """What must have run before, on another rank or, for the last stage, on this one."""
    kind, stage, microbatch = action
    if kind == "F":
        return Action("F", stage - 1, microbatch) if stage else None
    if stage == stages - 1:
        return Action("F", stage, microbatch)
    return Action("B", stage + 1, microbatch)
