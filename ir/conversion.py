"""Conversions between types, and the one law: the dual of A→B is dual(B)→dual(A).

A conversion between n-d types is carried out as a sequence of one-axis *steps*, ordered so that
what makes the value smaller comes first and nested splits are taken apart from the inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .types import AxisType, I, NdType, R

Collective = Literal[
    "none", "slice", "keep_one", "pad", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"
]
"""What a step does. `slice`, `keep_one` (zero on all ranks but the first) and `pad` are local."""

LOCAL: frozenset[Collective] = frozenset({"none", "slice", "keep_one", "pad"})

_COLLECTIVE: dict[tuple[str, str], Collective] = {
    ("S", "R"): "all_gather",
    ("S", "I"): "all_gather",
    ("S", "P"): "pad",
    ("R", "S"): "slice",
    ("I", "S"): "slice",
    ("R", "I"): "none",
    ("I", "R"): "none",
    ("R", "P"): "keep_one",
    ("I", "P"): "keep_one",
    ("P", "S"): "reduce_scatter",
    ("P", "R"): "all_reduce",
    ("P", "I"): "all_reduce",
    ("S", "S"): "all_to_all",
}


def collective(source: AxisType, target: AxisType) -> Collective:
    """What converting between two types of one axis does in the forward pass."""
    return "none" if source == target else _COLLECTIVE[source.kind, target.kind]


def backward_collective(source: AxisType, target: AxisType) -> Collective:
    """What the gradient of the conversion does: `collective` of the dual.

    The gradient of `R→I` would sum nothing and keep one summand: it is `I→P`, local too.
    """
    return collective(target.dual, source.dual)


@dataclass(frozen=True, slots=True)
class Step:
    """One axis of a conversion."""

    axis: str
    source: AxisType
    target: AxisType

    @property
    def forward(self) -> Collective:
        return collective(self.source, self.target)

    @property
    def backward(self) -> Collective:
        return backward_collective(self.source, self.target)

    @property
    def dual(self) -> Step:
        """The same step on the gradient."""
        return Step(self.axis, self.target.dual, self.source.dual)

    def __str__(self) -> str:
        return f"{self.axis}: {self.source}→{self.target}"


# Cheapest first: what shrinks the value, then reductions, then what grows it.
_ORDER: tuple[Collective, ...] = (
    "slice", "reduce_scatter", "none", "keep_one", "all_to_all", "all_reduce", "all_gather", "pad",
)  # fmt: skip


@lru_cache(maxsize=200_000)
def steps(source: NdType, target: NdType) -> tuple[Step, ...]:
    """The one-axis steps from `source` to `target`, in an order that nesting allows.

    Both types name the same axes in the same order. Splits of one factor by several axes nest in
    that order: only the innermost split can be undone, and a split can be added only inside those
    that are there. Where the two nestings conflict, the split in the way is gathered and made
    again.
    """
    names = [axis for axis, _ in source]
    state = dict(source.axes)
    goal = dict(target.axes)
    rank = {axis: i for i, axis in enumerate(names)}
    done: list[Step] = []

    def inner(axis: str, kind: AxisType) -> list[str]:
        """Axes inside `axis` that now split the factor of `kind`, innermost first."""
        return [a for a in reversed(names) if rank[a] > rank[axis] and state[a] == kind]

    def take(axis: str, kind: AxisType) -> None:
        done.append(Step(axis, state[axis], kind))
        state[axis] = kind

    while pending := [axis for axis in names if state[axis] != goal[axis]]:
        ready: list[tuple[int, int, str]] = []
        for axis in pending:
            blocked = state[axis].is_split and inner(axis, state[axis])
            blocked = blocked or (goal[axis].is_split and inner(axis, goal[axis]))
            # an outer axis that has still to take or leave the same factor must do so first
            waiting = goal[axis].is_split and any(
                state[a] != goal[a] and goal[axis] in (state[a], goal[a])
                for a in names[: rank[axis]]
            )
            if not blocked and not waiting:
                order = _ORDER.index(collective(state[axis], goal[axis]))
                ready.append((order, -rank[axis], axis))
        if ready:
            axis = min(ready)[2]
            take(axis, goal[axis])
            continue
        # Conflict: gather the innermost split that stands in somebody's way.
        in_the_way = {
            a
            for axis in pending
            for kind in (state[axis], goal[axis])
            if kind.is_split
            for a in inner(axis, kind)
        }
        axis = max(in_the_way, key=lambda a: rank[a])
        take(axis, R if goal[axis].kind in ("R", "P") else I)
    return tuple(done)


def dual_steps(source: NdType, target: NdType) -> tuple[Step, ...]:
    """What the gradient undergoes: the duals of the steps, in reverse."""
    return tuple(step.dual for step in reversed(steps(source, target)))
