"""Going on with a new plan, or waiting until the lost nodes are repaired.

Counted on both sides are the next `steps` steps: moving and then steps of the new plan, against the
repair and then steps of the old plan. Not counted, as both may need it: reading from a checkpoint
what no device has any more (the repaired nodes come back empty), the steps done since that
checkpoint, and starting programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Waiting:
    """Seconds of a step of the old and the new plan, seconds to move, steps ahead; seconds until
    the repair, None where nobody knows."""

    before_seconds: float
    after_seconds: float
    move_seconds: float
    steps: int
    repair_seconds: float | None = None

    @property
    def replan_seconds(self) -> float:
        """Moving, and all steps under the new plan."""
        return self.move_seconds + self.steps * self.after_seconds

    @property
    def wait_seconds(self) -> float | None:
        """The repair, and all steps under the old plan."""
        if self.repair_seconds is None:
            return None
        return self.repair_seconds + self.steps * self.before_seconds

    @property
    def break_even_seconds(self) -> float:
        """Above this repair time the new plan has done `steps` steps earlier; 0 where it has
        whenever the repair comes."""
        return max(0.0, self.replan_seconds - self.steps * self.before_seconds)

    @property
    def returning_seconds(self) -> float:
        """Above this repair time it pays to move, train until the repair and move back: the steps
        of the new plan until then are more than the old plan's in the time of moving back,
        `(S - M) / T_new > M / T_old`."""
        return self.move_seconds * (1 + self.after_seconds / self.before_seconds)

    def to_json(self) -> dict[str, Any]:
        """`replan.wait` of `shardwright replan --json`."""
        found: dict[str, Any] = {
            "steps": self.steps,
            "break_even_seconds": self.break_even_seconds,
            "returning_break_even_seconds": self.returning_seconds,
            "repair_seconds": self.repair_seconds,
            "replan_seconds": self.replan_seconds,
            "wait_seconds": self.wait_seconds,
        }
        if self.wait_seconds is not None:
            found["faster"] = "replan" if self.replan_seconds < self.wait_seconds else "wait"
        return found
