"""Times one measurement on this rank: a collective of its group, or messages with its partner."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

from ..curves import CollectiveKind
from ..ranks import Team
from .rounds import Family, Pairs
from .schedule import Item

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

_ELEMENT_BYTES = 4
"""float32: what gradients are reduced in; the other collectives do not care."""


def moved_bytes(kind: CollectiveKind, bytes: int, size: int) -> int:
    """What is really sent for a nominal size: rounded up so that it divides over the group.

    `bytes` is the full logical tensor as in `collective_seconds`.
    """
    parts = {"all_to_all": size * size, "send": 1, "broadcast": 1, "all_reduce": 1}.get(kind, size)
    unit = parts * _ELEMENT_BYTES
    return -(-bytes // unit) * unit


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one operation, NaN where this rank had no part; `waited_s` for the others before
    it began."""

    seconds: float
    waited_s: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """What this rank measures with: its groups, its partners and its buffers."""

    team: Team
    families: tuple[Family, ...]
    groups: tuple[ProcessGroup | None, ...]
    partners: tuple[int | None, ...]
    whole: torch.Tensor
    part: torch.Tensor

    @staticmethod
    def of(
        team: Team, families: tuple[Family, ...], rounds: tuple[Pairs, ...], most_bytes: int
    ) -> Exchange:
        """Makes the groups of this rank, and buffers for operations of up to `most_bytes`."""
        import torch
        import torch.distributed as dist

        groups: list[ProcessGroup | None] = []
        for family in families:
            # All ranks make all groups: made by their members alone, they get names that differ
            # where some rank is in none (torch 2.13 counts the groups of a rank in their names).
            made = {ranks: dist.new_group(list(ranks)) for ranks in family.groups}
            mine = family.group_of(team.rank)
            groups.append(None if mine is None else made[mine])
        partners = tuple(_partner(pairs, team.rank) for pairs in rounds)
        room = most_bytes // _ELEMENT_BYTES + max(f.size for f in families) ** 2
        return Exchange(
            team,
            families,
            tuple(groups),
            partners,
            torch.zeros(room, device=team.device),
            torch.zeros(room // 2 + 1, device=team.device),  # a part of a group of two or more
        )

    def measure(self, item: Item) -> Sample:
        """Waits for all ranks, then takes part in the item; all ranks must call it."""
        waited_s = self.team.together()
        if item.series.kind == "send":
            partner = self.partners[item.round]
            seconds = nan if partner is None else self._to_and_fro(item, partner)
        else:
            group = self.groups[item.series.family]
            seconds = nan if group is None else self._collective(item, group)
        return Sample(seconds, waited_s)

    def _collective(self, item: Item, group: ProcessGroup) -> float:
        kind, size = item.series.kind, self.families[item.series.family].size
        count = moved_bytes(kind, item.bytes, size) // _ELEMENT_BYTES
        operate = self._operation(kind, count, size, group)
        if item.inner > 1:
            # Ranks leave the barrier one by one; an untimed operation makes them start as one.
            # Where a single long one is timed, that difference is little of it.
            operate()
        return self._timed(operate, item.inner)

    def _operation(
        self, kind: CollectiveKind, count: int, size: int, group: ProcessGroup
    ) -> Callable[[], object]:
        import torch.distributed as dist

        whole, part = self.whole[:count], self.part[: count // size]
        root = dist.get_global_rank(group, 0)
        operations: Mapping[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "all_gather": lambda: dist.all_gather_single(whole, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_single(part, whole, group=group),
            "all_to_all": lambda: dist.all_to_all_single(part, whole[: count // size], group=group),
            "broadcast": lambda: dist.broadcast(whole, root, group=group),
        }
        return operations[kind]

    def _to_and_fro(self, item: Item, partner: int) -> float:
        """Seconds of one message to the partner; the partner times its own to this rank.

        Each message is answered by an empty one, so that its arrival is timed, and what an empty
        one takes is taken off.
        """
        message = self.whole[: item.bytes // _ELEMENT_BYTES]
        first = self.team.rank < partner
        empty_s = self._answered(self.part[:1], partner, item.inner, asks=first) / 2
        there = self._answered(message, partner, item.inner, asks=first)
        back = self._answered(message, partner, item.inner, asks=not first)
        mine = there if first else back
        return max(mine - empty_s, empty_s)

    def _answered(self, message: torch.Tensor, partner: int, times: int, asks: bool) -> float:
        """Seconds of a message and its empty answer."""
        import torch.distributed as dist

        answer = self.part[:1]

        def operate() -> None:
            if asks:
                dist.send(message, partner)
                dist.recv(answer, partner)
            else:
                dist.recv(message, partner)
                dist.send(answer, partner)

        return self._timed(operate, times)

    def _timed(self, operate: Callable[[], object], times: int) -> float:
        self._finish()
        before = time.perf_counter()
        for _ in range(times):
            operate()
        self._finish()
        return (time.perf_counter() - before) / times

    def _finish(self) -> None:
        if self.team.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.team.device)


def _partner(pairs: Pairs, rank: int) -> int | None:
    for first, second in pairs:
        if rank in (first, second):
            return second if rank == first else first
    return None
