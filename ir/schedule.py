"""ScheduleTable: which rank of a pipeline runs which microbatch of which stage, and in what order.

A *stage* here is a virtual stage: with `vpp` of them per rank there are `pp · vpp`. Actions follow
torch.distributed.pipelining: `F` forward, `B` full backward, or its halves, `I` the gradient of the
input and `W` that of the weights. `ir.schedule_rows` makes the tables of the known schedules; what
a table takes is `costmodel.simulate`'s to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput

ActionKind = Literal["F", "B", "I", "W"]
KINDS: tuple[ActionKind, ...] = ("F", "B", "I", "W")
F, B, I, W = range(4)  # noqa: E741  # the field's letters, as codes in the arrays of a table

Ints = NDArray[np.intp]


class Action(NamedTuple):
    """One piece of work: a pass of a microbatch through a (virtual) stage."""

    kind: ActionKind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        """As torch writes it in schedule files: `0F3`."""
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, eq=False)
class ScheduleTable:
    """The order of work on every rank of a pipeline, rank after rank in flat arrays.

    `kind` (codes of KINDS), `stage` and `microbatch` describe all actions; those of rank r are
    `first[r]` to `first[r + 1]`. `placement` maps a stage to its rank. `rows` are the same as
    tuples of Actions.
    """

    name: str
    pp: int
    vpp: int
    microbatches: int
    placement: tuple[int, ...]
    first: Ints
    kind: Ints
    stage: Ints
    microbatch: Ints

    @property
    def stages(self) -> int:
        """Virtual stages of the whole pipeline."""
        return len(self.placement)

    @cached_property
    def rows(self) -> tuple[tuple[Action, ...], ...]:
        """Per rank its actions in order (made when asked for: a long table has many)."""
        columns = zip(
            self.kind.tolist(), self.stage.tolist(), self.microbatch.tolist(), strict=True
        )
        actions = [Action(KINDS[kind], stage, microbatch) for kind, stage, microbatch in columns]
        bounds = self.first.tolist()
        return tuple(tuple(actions[bounds[r] : bounds[r + 1]]) for r in range(self.pp))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The virtual stages of a rank, in order of the model."""
        return tuple(s for s, r in enumerate(self.placement) if r == rank)

    @cached_property
    def order(self) -> Order:
        """What each action waits for, and in which wave it can run (InvalidInput: `check`)."""
        return _order(self)

    def check(self) -> None:
        """Raises InvalidInput unless every rank runs its own stages, every microbatch of a stage
        has one forward and one backward (whole, or both halves), and no rank waits for ever."""
        where = np.repeat(np.arange(self.pp), np.diff(self.first))
        strange = np.flatnonzero(
            (self.stage < 0)
            | (self.stage >= self.stages)
            | (self.microbatch < 0)
            | (self.microbatch >= self.microbatches)
        )
        if len(strange):
            raise InvalidInput(
                f"schedule {self.name}: {self._action(strange[0])} on rank {where[strange[0]]}: "
                f"expected stages below {self.stages} and microbatches below {self.microbatches}"
            )
        foreign = np.flatnonzero(np.asarray(self.placement)[self.stage] != where)
        if len(foreign):
            raise InvalidInput(
                f"schedule {self.name}: {self._action(foreign[0])} on rank {where[foreign[0]]}, "
                f"expected on rank {self.placement[self.stage[foreign[0]]]}, which holds the stage"
            )
        counts = np.zeros((4, self.stages, self.microbatches), np.intp)
        np.add.at(counts, (self.kind, self.stage, self.microbatch), 1)
        backward = ((counts[B] == 1) & (counts[I] == 0) & (counts[W] == 0)) | (
            (counts[B] == 0) & (counts[I] == 1) & (counts[W] == 1)
        )
        wrong = np.argwhere((counts[F] != 1) | ~backward)
        if len(wrong):
            stage, microbatch = wrong[0].tolist()
            found = dict(zip(KINDS, counts[:, stage, microbatch].tolist(), strict=True))
            raise InvalidInput(
                f"schedule {self.name}: stage {stage} runs microbatch {microbatch} {found} times, "
                "expected one F, and one B or one I and one W"
            )
        _ = self.order

    def held(self, rank: int) -> tuple[Ints, Ints]:
        """Microbatches held during each action of a rank: arrays [action, local stage].

        First those whose activations are kept whole (from F to the end of B or I), then those of
        which only what W needs is left (from I to the end of W).
        """
        here = slice(self.first[rank], self.first[rank + 1])
        kind = self.kind[here, None]
        own = self.stage[here, None] == np.asarray(self.stages_of(rank))
        forward, backward, weights = (own & np.isin(kind, kinds) for kinds in ((F,), (B, I), (W,)))
        split = own & (kind == I)

        def between(taken: NDArray[np.bool_], released: NDArray[np.bool_]) -> Ints:
            # what an action releases is there until it ends, what it leaves comes after
            count: Ints = np.cumsum(taken.astype(np.intp) - released, axis=0)
            return count + released

        after_split = np.zeros_like(split)
        after_split[1:] = split[:-1]
        return between(forward, backward), between(after_split, weights)

    def in_flight(self, rank: int) -> tuple[int, ...]:
        """Per virtual stage of a rank, the most microbatches it holds at once (whole or half)."""
        whole, half = self.held(rank)
        return tuple((whole + half).max(axis=0).tolist())

    def peak_bytes(
        self, rank: int, saved_bytes: Sequence[float], weight_bytes: Sequence[float]
    ) -> float:
        """The most that a rank's activations take at one time.

        Per virtual stage of the rank: `saved_bytes` of one microbatch from F to B or I, of which
        `weight_bytes` stay from I to W.
        """
        whole, half = self.held(rank)
        return float((whole @ np.asarray(saved_bytes) + half @ np.asarray(weight_bytes)).max())

    def to_json(self) -> dict[str, Any]:
        """Rows are written as torch's schedule files do: `"0F0,0F1,0B0"`."""
        return {
            "name": self.name,
            "microbatches": self.microbatches,
            "placement": list(self.placement),
            "rows": [",".join(map(str, row)) for row in self.rows],
        }

    def _action(self, index: int) -> Action:
        return Action(KINDS[self.kind[index]], int(self.stage[index]), int(self.microbatch[index]))


@dataclass(frozen=True, eq=False)
class Order:
    """The dependencies of a table's actions, sorted into waves.

    `actions` lists all actions (indices into the table's arrays) wave by wave: those of a wave wait
    only for earlier waves. Wave w is `bounds[w]` to `bounds[w + 1]`. Per action in this order,
    `before` is the position (from 1; 0 is the start of the step) of the action before it on its
    rank, `needs` of the one whose output it takes, and `code` is kind · stages + stage.
    """

    actions: Ints
    bounds: Ints
    before: Ints
    needs: Ints
    code: Ints

    @cached_property
    def inputs(self) -> tuple[Ints, ...]:
        """Per wave the `before` and then the `needs` of its actions."""
        bounds = self.bounds.tolist()
        return tuple(
            np.concatenate([self.before[a:b], self.needs[a:b]]) for a, b in pairwise(bounds)
        )

    @cached_property
    def slots(self) -> tuple[Ints, Ints]:
        """Where `before` and `needs` of each action are in the `inputs` of all waves in a row."""
        wave = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        position = np.arange(len(self.actions))
        return position + self.bounds[wave], position + self.bounds[wave + 1]


def table_from_rows(
    name: str,
    rows: Sequence[Sequence[Action]],
    microbatches: int,
    placement: Sequence[int],
) -> ScheduleTable:
    """A table of any schedule, checked. Raises InvalidInput where it cannot run."""
    pp = len(rows)
    if not pp or len(placement) % pp:
        raise InvalidInput(
            f"schedule {name}: {len(placement)} stages on {pp} ranks, expected as many per rank"
        )
    counts = np.bincount(placement, minlength=pp)
    if counts.tolist() != [len(placement) // pp] * pp:
        raise InvalidInput(
            f"schedule {name}: {counts.tolist()} stages per rank, expected as many on each"
        )
    actions = [action for row in rows for action in row]
    table = ScheduleTable(
        name,
        pp,
        len(placement) // pp,
        microbatches,
        tuple(placement),
        np.cumsum([0, *map(len, rows)]),
        np.array([KINDS.index(a.kind) for a in actions], np.intp),
        np.array([a.stage for a in actions], np.intp),
        np.array([a.microbatch for a in actions], np.intp),
    )
    table.check()
    return table


def table_from_json(data: Mapping[str, Any]) -> ScheduleTable:
    """What `ScheduleTable.to_json` wrote. Raises InvalidInput for anything else."""
    try:
        rows = [[_parsed(text) for text in row.split(",")] for row in data["rows"]]
        name, microbatches = str(data["name"]), int(data["microbatches"])
        placement = [int(rank) for rank in data["placement"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"schedule: {error}; expected name, microbatches, placement, rows of actions like 0F3"
        ) from error
    return table_from_rows(name, rows, microbatches, placement)


def _parsed(text: str) -> Action:
    for kind in KINDS:
        stage, found, microbatch = text.strip().partition(kind)
        if found:
            return Action(kind, int(stage), int(microbatch))
    raise ValueError(f"{text!r} is no action")


def _order(table: ScheduleTable) -> Order:
    """Waves by Kahn's method, all ranks at once: in each, every rank runs its next action if what
    it needs ran in an earlier wave."""
    count, source, never = len(table.kind), len(table.kind), len(table.kind) + 1
    needs = np.append(_needs(table), [never, never])
    wave_of = np.full(count + 2, np.iinfo(np.intp).max, np.intp)
    wave_of[source] = -1
    following = np.where(table.first[:-1] < table.first[1:], table.first[:-1], never)
    end = table.first[1:]
    waves: list[Ints] = []
    while True:
        runs = wave_of[needs[following]] < len(waves)
        ready = following[runs]
        if not len(ready):
            break
        wave_of[ready] = len(waves)
        waves.append(ready)
        following[runs] += 1
        following[following == end] = never
    actions = np.concatenate(waves) if waves else np.empty(0, np.intp)
    if len(actions) < count:
        stuck = int(following[following < never][0])
        raise InvalidInput(
            f"schedule {table.name}: {table._action(stuck)} waits for ever: what it needs comes "
            "later on a rank that waits for it, or is missing"
        )
    position = np.zeros(count + 1, np.intp)
    position[actions] = np.arange(1, count + 1)
    before = actions - 1
    before[np.isin(actions, table.first[:-1])] = source
    return Order(
        actions,
        np.cumsum([0, *map(len, waves)]),
        position[before],
        position[needs[actions]],
        table.kind[actions] * table.stages + table.stage[actions],
    )


def _needs(table: ScheduleTable) -> Ints:
    """Per action the index of the one whose output it takes; the number of actions for none."""
    shape = (table.stages + 2, table.microbatches)  # a row before the first stage, one after
    none = len(table.kind)
    forward, backward = np.full(shape, none, np.intp), np.full(shape, none, np.intp)
    at, stage, microbatch = np.arange(none), table.stage + 1, table.microbatch
    is_forward, is_weight = table.kind == F, table.kind == W
    is_backward = ~is_forward & ~is_weight
    forward[stage[is_forward], microbatch[is_forward]] = at[is_forward]
    backward[stage[is_backward], microbatch[is_backward]] = at[is_backward]
    backward[-1] = forward[-2]  # the loss: the last stage's backward follows its own forward
    return np.where(
        is_forward,
        forward[stage - 1, microbatch],
        backward[np.where(is_weight, stage, stage + 1), microbatch],
    )
