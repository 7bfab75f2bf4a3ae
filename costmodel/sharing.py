"""Different collectives at once: what each takes while they share links.

A collective keeps the links of a level busy for part of its time: what must cross the level over
what its devices can send. While several run, none gets more of a level than is fair: all slow down
by the same factor until a level is no longer over-full, and those that no full level holds back go
on at full speed (max-min fairness: Bertsekas & Gallager, Data Networks, §6.5). When one ends, the
others speed up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .algorithms import level_s_per_byte
from .cluster import Cluster
from .collectives import collective_seconds
from .curves import CollectiveKind
from .groups import Group, hops


@dataclass(frozen=True, slots=True)
class Call:
    """A collective of `bytes` over a group, as `collective_seconds` has them; all groups of its
    mesh axis run it at once."""

    kind: CollectiveKind
    bytes: float
    group: Group


def concurrent_seconds(cluster: Cluster, calls: Sequence[Call]) -> tuple[float, ...]:
    """When each of several collectives, started together, ends.

    A collective alone takes what `collective_seconds` says, and so do collectives that share no
    level. Raises InvalidInput as `collective_seconds` does.
    """
    alone = [collective_seconds(cluster, call.kind, call.bytes, call.group) for call in calls]
    loads = [_loads(cluster, call, seconds) for call, seconds in zip(calls, alone, strict=True)]
    left = dict(enumerate(alone))
    ended = [0.0] * len(calls)
    now = 0.0
    while left:
        speeds = _fair_speeds({i: loads[i] for i in left})
        step = min(left[i] / speeds[i] for i in left)
        now += step
        for i in tuple(left):
            if left[i] / speeds[i] <= step * (1 + 1e-12):
                ended[i] = now
                del left[i]
            else:
                left[i] -= step * speeds[i]
    return tuple(ended)


def _loads(cluster: Cluster, call: Call, seconds: float) -> dict[int, float]:
    """By level of the cluster, the share of its bandwidth that a collective alone takes."""
    path = hops(cluster, call.group)
    if not path or not seconds:
        return {}
    busy = level_s_per_byte(call.kind, path)
    return {
        hop.index: min(1.0, call.bytes * each / seconds)
        for hop, each in zip(path, busy, strict=True)
        if each
    }


def _fair_speeds(loads: dict[int, dict[int, float]]) -> dict[int, float]:
    """Speed of each collective, 1 alone: raised together, each until a level it uses is full."""
    speeds: dict[int, float] = {}
    room = {level: 1.0 for load in loads.values() for level in load}
    rising = dict(loads)
    while rising:
        wanted = {
            level: total
            for level in room
            if (total := sum(load.get(level, 0.0) for load in rising.values())) > 0
        }
        full = min(wanted, key=lambda level: room[level] / wanted[level], default=None)
        speed = 1.0 if full is None else min(1.0, room[full] / wanted[full])
        stopped = [
            i for i, load in rising.items() if speed == 1.0 or (full is not None and full in load)
        ]
        for i in stopped:
            speeds[i] = speed
            for level, part in rising.pop(i).items():
                room[level] = max(0.0, room[level] - part * speed)
    return speeds
