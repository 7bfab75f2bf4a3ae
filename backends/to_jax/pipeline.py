"""Which program a plan gets: one for all devices, one per stage, or clock ticks over equal stages.

Stages are programs of their own on their parts of the mesh, called in the order of the planned
schedule. Where they are all equal and the schedule is GPipe's, one program does: each device runs
the layers of its stage at every tick, and backward passes are what JAX makes of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...ir.errors import InvalidInput
from ...ir.paths import family, owns
from ...ir.plan import Plan, Stage
from ...ir.schedule_rows import schedule_table
from ..emission.lines import draws
from ..emission.target import Target
from ..emission.wiring import Wiring

Kind = Literal["whole", "stages", "ticks"]

SCHEDULES = ("1f1b", "gpipe", "interleaved")


@dataclass(frozen=True, slots=True)
class ProgramForm:
    """The form of a plan's program, and why it is this one, as the program's docstring says it."""

    kind: Kind
    reason: str = ""


def program_form(plan: Plan) -> ProgramForm:
    """The form that a plan's program gets.

    Raises InvalidInput for a schedule that none of them runs.
    """
    strategy = plan.strategy
    if strategy.pp == 1:
        return ProgramForm("whole")
    if strategy.schedule not in SCHEDULES:
        raise InvalidInput(
            f"schedule={strategy.schedule}: jax programs run {', '.join(SCHEDULES)}; backward "
            "passes are not split into halves"
        )
    schedule_table(strategy.schedule, strategy.pp, plan.microbatches, strategy.vpp)
    if strategy.schedule != "gpipe":
        return ProgramForm("stages", f"the schedule is {strategy.schedule}, no scan over ticks")
    if difference := _difference(plan):
        return ProgramForm("stages", difference)
    return ProgramForm("ticks", "stages are equal, and GPipe's order is what a scan over ticks has")


def ends_apart(plan: Plan) -> Plan:
    """The plan with three stages in place of its own: what comes before the layers, the layers, and
    what comes after them."""
    first, last = _layers(plan)
    modes = [mode for stage in plan.stages for mode in stage.recompute]
    bounds = ((0, first), (first, last), (last, len(modes)))
    return replace(plan, stages=tuple(Stage(a, b, tuple(modes[a:b])) for a, b in bounds))


def _layers(plan: Plan) -> tuple[int, int]:
    first, count = plan.model.layer_run
    return first, first + count


def _difference(plan: Plan) -> str:
    """What makes stages unequal, or "" where they are equal but for the ends of the model."""
    model = plan.model
    first, last = _layers(plan)
    segments = model.segments[first:last]
    shares = [(max(s.first, first), min(s.last, last)) for s in plan.stages]
    counts = [b - a for a, b in shares]
    if len(set(counts)) > 1 or not counts[0]:
        return f"stages have {'-'.join(map(str, counts))} layers"
    if first == 0 or last == len(model.segments):
        return "there is nothing before or after the layers"
    if any(not s.module for s in segments) or len({s.block for s in segments}) > 1:
        return "layers differ"
    modes = {plan.stages[i].recompute[k - plan.stages[i].first]
             for i, (a, b) in enumerate(shares) for k in range(a, b)}  # fmt: skip
    if len(modes) > 1:
        return "recomputation differs between layers"
    if any(name in model.tied for s in segments for name in s.parameters):
        return "layers share parameters"
    parents = {s.module.rpartition(".")[0] or family(s.module) for s in segments}
    if len(parents) > 1 or not all(owns(s.module, n) for s in segments for n in s.parameters):
        return "layers have no name in common"
    if any(draws(model.blocks[s.block]) for s in segments):
        return "layers draw random numbers"
    wiring = Wiring(ends_apart(plan), Target(plan.mesh))
    entering, leaving = wiring.carried(0), wiring.carried(1)
    if len(entering) != 1 or len(leaving) != 1:
        return "more than one value passes between layers"
    into, out = entering[0], leaving[0]
    if wiring.types[into] != wiring.types[out] or (
        wiring.values[into].dims != wiring.values[out].dims
    ):
        return "what enters the layers is not like what leaves them"
    return ""
