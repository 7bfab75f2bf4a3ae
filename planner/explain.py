"""Why a plan takes what it takes: where time and memory go, what binds, what the runners-up lose.

What `shardwright explain` shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ..ir.conversion import LOCAL, steps
from ..ir.plan import Alternative, Plan
from .report import GIB, conversions, render, summary, table
from .sensitivity import MORE, Change, sensitivity

_FELT = 0.003
"""Of a step: 10 % more of something that saves less does not bind."""
_DUST = 1e-9
"""Of a step: what rounding makes of equal seconds."""
_FULL = 0.9
"""Of the memory of a stage: fuller ones are named."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan, what changes would do to it, and per runner-up the seconds by cause that it takes
    longer (below 0: less); these add up to the difference of the steps."""

    plan: Plan
    changes: tuple[Change, ...]
    losses: tuple[Mapping[str, float], ...]

    @staticmethod
    def of(plan: Plan) -> Explanation:
        """Prices the plan again with one thing changed at a time."""
        return Explanation(
            plan, sensitivity(plan), tuple(_losses(plan, other) for other in plan.alternatives)
        )

    @property
    def binds(self) -> tuple[tuple[str, float], ...]:
        """What a step would be shorter with more of, and the part of it that a tenth more saves;
        the most important first. Last the batch, if a step of twice as many sequences saves."""
        more = [each for each in self.changes if each.factor > 1 and each.saves > _FELT]
        more.sort(key=lambda each: (each.factor != MORE, -each.saves))
        return tuple((self._named(each), each.saves) for each in more)

    def _named(self, change: Change) -> str:
        if change.what == "memory":
            used = self._used()
            stage = max(range(len(used)), key=used.__getitem__)
            return f"memory of stage {stage} ({used[stage]:.0%} full)"
        if change.what == "global batch":
            return f"global batch ({self.plan.microbatches} microbatches; twice as large)"
        return change.what

    def _used(self) -> list[float]:
        predicted = self.plan.predicted
        return [
            held / limit
            for held, limit in zip(predicted.memory_bytes, predicted.limits_bytes, strict=True)
        ]

    def __str__(self) -> str:
        plan = self.plan
        relaxation = ", ".join(f"{n} {how}" for how, n in plan.certificate.relaxation.items())
        return render(
            summary(plan), "", self._times(), "", self._binding(), "", self._sensitivity(), "",
            _conversions(plan), "", f"Sharding programs solved: {relaxation or 'none'}", "",
            self._runners_up(), *self._lost(), width=150,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What `shardwright explain --json` prints."""
        predicted = self.plan.predicted
        return {
            "step_seconds": predicted.step_seconds,
            "time": dict(predicted.time),
            "memory": [dict(stage) for stage in predicted.memory],
            "memory_used": self._used(),
            "binds": [{"what": what, "saves": saves} for what, saves in self.binds],
            "sensitivity": [
                {"what": c.what, "factor": c.factor, "step_fraction": c.step_fraction}
                for c in self.changes
            ],
            "alternatives": [
                {
                    "strategy": other.strategy.to_json(),
                    "step_seconds": other.step_seconds,
                    "memory_bytes": other.memory_bytes,
                    "reason": other.reason,
                    "loses": dict(lost),
                }
                for other, lost in zip(self.plan.alternatives, self.losses, strict=True)
            ],
        }

    def _times(self) -> Table:
        predicted = self.plan.predicted
        times = table("Time of a step", "part", "seconds", "share")
        for part, seconds in predicted.time.items():
            share = seconds / predicted.step_seconds
            times.add_row(part.replace("_", " "), f"{seconds:.4g}", f"{share:.1%}")
        times.add_row("step", f"{predicted.step_seconds:.4g}", "")
        return times

    def _binding(self) -> str:
        plan, used = self.plan, self._used()
        lines = ["What binds, and what a tenth more of it saves:"]
        lines += [f"  {what}: {saves:.1%} of a step" for what, saves in self.binds]
        fullest = max(range(len(used)), key=used.__getitem__)
        state = "full" if used[fullest] > _FULL else "not full"
        lines.append(f"  memory is {state}: stage {fullest} uses {used[fullest]:.0%} of it")
        modes = {mode for stage in plan.stages for mode in stage.recompute}
        if modes & {"selective", "full"}:
            lines.append("  some layers are recomputed to fit the memory")
        if "offload" in modes:
            lines.append("  activations of some layers wait in host memory, as they do not fit")
        bubble = plan.predicted.time.get("pipeline_bubble", 0.0) / plan.predicted.step_seconds
        if bubble > 0.05:
            lines.append(f"  {plan.microbatches} microbatches leave a bubble of {bubble:.0%}")
        return "\n".join(lines)

    def _sensitivity(self) -> Table:
        shown = table("Sensitivity of a step", "with", "times", "per sequence")
        for change in self.changes:
            takes = "does not fit"
            if change.step_fraction is not None:
                takes = f"{change.step_fraction - 1:+.2%}"
            shown.add_row(change.what, f"{change.factor:g}", takes)
        return shown

    def _runners_up(self) -> Table:
        shown = table("Runners-up", "strategy", "step s", "GiB")
        shown.add_column("loses")
        for other in self.plan.alternatives:
            seconds = "-" if other.step_seconds is None else f"{other.step_seconds:.4g}"
            gib = f"{other.memory_bytes / GIB:.1f}"
            shown.add_row(str(other.strategy), seconds, gib, other.reason)
        return shown

    def _lost(self) -> list[Table | str]:
        """What each runner-up takes longer for, by cause."""
        if not any(self.losses):
            return []
        ranks = [str(i + 1) for i in range(len(self.losses))]
        shown = table("Where runners-up lose, seconds", "part", *ranks)
        for part in dict.fromkeys(part for lost in self.losses for part in lost):
            cells = [f"{lost.get(part, 0.0):+.3g}" for lost in self.losses]
            shown.add_row(part.replace("_", " "), *cells)
        shown.add_row("step", *(f"{sum(lost.values()):+.3g}" for lost in self.losses))
        return ["", shown]


def _losses(plan: Plan, other: Alternative) -> dict[str, float]:
    """Seconds by cause that a runner-up takes longer; the causes it loses most on first."""
    if not other.time:
        return {}
    lost = Counter(other.time)
    lost.subtract(plan.predicted.time)
    felt = _DUST * plan.predicted.step_seconds
    return {part: seconds for part, seconds in lost.most_common() if abs(seconds) > felt}


def _conversions(plan: Plan) -> Table:
    shown = table(
        "Collectives per microbatch and block", "block", "value", "conversion", "forward",
        "backward",
    )  # fmt: skip
    for block, graph in plan.model.blocks.items():
        for value, source, target in conversions(graph, plan.annotations[block]):
            for step in steps(source, target):
                axis = plan.mesh[step.axis]
                if axis.size > 1 and not (step.forward in LOCAL and step.backward in LOCAL):
                    shown.add_row(block, value, str(step), step.forward, step.backward)
    return shown
