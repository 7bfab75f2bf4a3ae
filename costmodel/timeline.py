"""Timeline: what a simulated step looks like, per action and per rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ir.schedule import Action, ScheduleTable

Array = NDArray[np.float64]


class Event(NamedTuple):
    """An action on a rank, in seconds from the start of the step."""

    rank: int
    action: Action
    start_s: float
    end_s: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """A simulated step: seconds from its start.

    `start_s`, `end_s` and `waited_s` (idle on the action's rank while its input was on the way) are
    aligned with the actions of `table`. Per pipeline rank, `gradients_end_s` is when its gradients
    are reduced and `rank_end_s` when it is ready for the next step.
    """

    table: ScheduleTable
    start_s: Array
    end_s: Array
    waited_s: Array
    gradients_end_s: Array
    rank_end_s: Array

    @property
    def step_s(self) -> float:
        """The whole step, to the end of its slowest rank."""
        return float(self.rank_end_s.max())

    @property
    def pipeline_s(self) -> float:
        """From the first forward to the end of the last backward of any rank."""
        return float(self.end_s.max())

    @cached_property
    def compute_end_s(self) -> Array:
        """Per rank the end of its last action."""
        return self.end_s[self.table.first[1:] - 1]

    @cached_property
    def busy_s(self) -> Array:
        """Per rank the seconds in which it runs actions."""
        return np.add.reduceat(self.end_s - self.start_s, self.table.first[:-1])

    @property
    def bubble_s(self) -> Array:
        """Per rank the seconds of the pipeline in which it runs nothing."""
        return self.pipeline_s - self.busy_s

    @property
    def inner_bubble_s(self) -> Array:
        """Per rank the same between its first and its last action: zero-bubble schedules close this
        one, and optimizers that do not wait for each other hide the rest."""
        return self.compute_end_s - self.start_s[self.table.first[:-1]] - self.busy_s

    @property
    def bubble_fraction(self) -> float:
        """Idle device time by all device time, from start to end of the pipeline."""
        return float(self.bubble_s.mean() / self.pipeline_s)

    @property
    def exposed_transfer_s(self) -> Array:
        """Per rank the seconds it stood idle while its next input was on the way."""
        return np.add.reduceat(self.waited_s, self.table.first[:-1])

    @property
    def exposed_sync_s(self) -> Array:
        """Per rank the seconds that reducing gradients adds after its last action, and what it
        slows compute by."""
        return self.gradients_end_s - self.compute_end_s

    def events(self) -> Iterator[Event]:
        """All actions, rank after rank in order."""
        columns = zip(self.start_s.tolist(), self.end_s.tolist(), strict=True)
        for rank, row in enumerate(self.table.rows):
            for action in row:
                yield Event(rank, action, *next(columns))
