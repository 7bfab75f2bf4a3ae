"""Moving a running job from one plan to another: who sends which part of which parameter to whom.

A conversion between two layouts, carried out on live memory: what a rank of the new plan keeps and
its device has not, comes from a device that has it. Which rank of the new plan goes to which device
is an assignment problem (`rank_order`), so that as much as possible is already there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..costmodel.cluster import Cluster
from ..ir.plan import Plan
from ..ir.region import Region
from .holdings import Holdings
from .rank_order import Seats, assigned

Bytes = NDArray[np.float64]

_MOST_DEVICES = 1024
"""Devices up to which the bound solves an assignment of single devices."""


@dataclass(frozen=True, slots=True)
class Move:
    """A part of a parameter's state, from a device to another; `source` is None where no device is
    left that has it, so that it must come from a checkpoint. Devices count as in the old cluster.
    """

    name: str
    source: int | None
    target: int
    region: Region
    bytes: int

    def to_json(self) -> dict[str, object]:
        """`boxes` are [offsets, sizes] in the parameter's full shape."""
        return {
            "name": self.name,
            "source": self.source,
            "target": self.target,
            "boxes": [[list(offsets), list(sizes)] for offsets, sizes in self.region.boxes()],
            "bytes": self.bytes,
        }


@dataclass(frozen=True, slots=True)
class Migration:
    """`node_of[place]` and `device_of[rank]` of the new plan, `before[rank]` the device of every
    rank of the old one. Bytes over links, and bytes that only a checkpoint has: no assignment of
    ranks to devices has a sum of both below the bound. Seconds over the links. `per_node` devices
    are a node's."""

    per_node: int
    node_of: tuple[int, ...]
    device_of: tuple[int, ...]
    before: tuple[int, ...]
    moved_bytes: int
    lost_bytes: int
    bound_bytes: int
    seconds: float
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Migrating:
    """A job on its way from an old plan to a new one of the same model.

    `cluster` is the old plan's, `nodes` those that the new one may use, as they are numbered there;
    nodes that joined come after its own. `given` says which takes which place; None: so that most
    of what is kept is there. Ranks change places as far as `rank_order` says that they may.
    """

    old: Holdings
    new: Holdings
    cluster: Cluster
    nodes: tuple[int, ...]
    given: tuple[int, ...] | None = None

    @cached_property
    def per_node(self) -> int:
        return self.cluster.devices_per_node

    @cached_property
    def before(self) -> tuple[int, ...]:
        """The device of every rank of the old plan."""
        return devices_of(self.old.plan, range(self.cluster.nodes))

    @cached_property
    def rank_on(self) -> dict[int, int]:
        """Device → rank of the old plan, of the devices that are left."""
        left = frozenset(self.nodes)
        return {
            device: rank
            for rank, device in enumerate(self.before)
            if device // self.per_node in left
        }

    @cached_property
    def shared(self) -> Bytes:
        """(new ranks, old ranks): bytes that both keep."""
        old, new = self.old, self.new
        total = np.zeros((new.pipe, new.corners, old.pipe, old.corners))
        groups: dict[tuple[str, int, tuple[int, ...], tuple[int, ...]], int] = defaultdict(int)
        for name, (block, index) in old.where.items():
            groups[block, index, new.stages[name], old.stages[name]] += 1
        parts: dict[tuple[str, int], Bytes] = {}
        for (block, index, to, since), count in groups.items():
            if (block, index) not in parts:
                ends = new.regions[block][index], old.regions[block][index]
                parts[block, index] = old.state_bytes * _overlap(*ends)
            for stage in to:
                for other in since:
                    total[stage, :, other, :] += count * parts[block, index]
        return total.reshape(new.pipe * new.corners, old.pipe * old.corners)

    @cached_property
    def kept(self) -> Bytes:
        """(new ranks, devices): bytes that a rank finds on a device."""
        devices = (max(self.nodes) + 1) * self.per_node
        found = np.zeros((len(self.shared), devices))
        found[:, list(self.rank_on)] = self.shared[:, list(self.rank_on.values())]
        return found

    @cached_property
    def device_of(self) -> tuple[int, ...]:
        """The device of every new rank."""
        return Seats(self.new.plan, self.cluster, self.nodes, self.kept).best(self.given)

    @cached_property
    def node_of(self) -> tuple[int, ...]:
        """The node of every place: as given, or in the order in which the ranks first come to
        them."""
        if self.given is not None:
            return self.given
        return tuple(dict.fromkeys(device // self.per_node for device in self.device_of))

    def estimated_seconds(self) -> float:
        """What the moves take at least: the device that receives most, from other nodes."""
        have = self.kept[np.arange(len(self.shared)), list(self.device_of)]
        missing = float((self.new.rank_bytes - have).max())
        return missing / self.cluster.worst_levels[-1].reached_bytes_per_s(1)

    def bound_bytes(self) -> int:
        """What must be received, from devices or a checkpoint, whichever rank of the new plan goes
        to whichever device of `nodes`: below everything that numbering processes anew, starting
        nodes in another order or leaving out others of them can reach."""
        wanted, here = int(self.new.rank_bytes.sum()), self.kept[:, [
            node * self.per_node + slot for node in self.nodes for slot in range(self.per_node)
        ]]  # fmt: skip
        if max(here.shape) > _MOST_DEVICES:  # each rank on the device that suits it best
            return wanted - int(here.max(axis=1).sum())
        best = assigned(here)
        return wanted - int(here[np.arange(len(here)), best].sum())

    def result(self) -> Migration:
        """All moves, worked out."""
        moves = tuple(self._moves())
        moved = sum(move.bytes for move in moves if move.source is not None)
        lost = sum(move.bytes for move in moves if move.source is None)
        bound = min(self.bound_bytes(), moved + lost)
        seconds = _seconds(moves, self.cluster)
        return Migration(
            self.per_node,
            self.node_of,
            self.device_of,
            self.before,
            moved,
            lost,
            bound,
            seconds,
            moves,
        )

    def _moves(self) -> Iterator[Move]:
        """Every part that a device wants and has not; of those that have it, one of its own node
        sends if there is one, and of these the one that has sent least."""
        sent: dict[int, int] = defaultdict(int)
        device_of_old = {rank: device for device, rank in self.rank_on.items()}
        old, new = self.old, self.new
        known: dict[tuple[str, int], list[list[tuple[Region, tuple[int, ...]]]]] = {}
        for name, (block, index) in new.where.items():
            if (block, index) not in known:
                known[block, index] = self._parts(block, index)
            for stage in new.stages[name]:
                for corner, wanted in enumerate(known[block, index]):
                    target = self.device_of[stage * new.corners + corner]
                    for part, corners in wanted:
                        having = [
                            device_of_old[rank]
                            for other in old.stages[name]
                            for at in corners
                            if (rank := other * old.corners + at) in device_of_old
                        ]
                        if target in having:
                            continue
                        node = target // self.per_node
                        near = [d for d in having if d // self.per_node == node] or having
                        source = min(near, key=lambda device: sent[device], default=None)
                        size = part.elements * new.state_bytes
                        if source is not None:
                            sent[source] += size
                        yield Move(name, source, target, part, size)

    def _parts(self, block: str, index: int) -> list[list[tuple[Region, tuple[int, ...]]]]:
        """Per new corner what it wants of a parameter, in pieces: each from one of the old regions,
        with the old corners that have that."""
        holding: dict[Region, list[int]] = {}
        for corner, region in enumerate(self.old.regions[block][index]):
            holding.setdefault(region, []).append(corner)
        return [
            [
                (part, tuple(corners))
                for region, corners in holding.items()
                if (part := region & wanted).elements
            ]
            for wanted in self.new.regions[block][index]
        ]


def devices_of(plan: Plan, nodes: Sequence[int]) -> tuple[int, ...]:
    """The device of every rank of a plan on the cluster's `nodes`: places in the order that its
    mapping says, processes numbered anew where it says so."""
    mapping, per_node = plan.mapping, int(plan.cluster["devices_per_node"])
    order = range(-(-plan.mesh.size // per_node)) if mapping is None else mapping.node_of
    found = [0] * plan.mesh.size
    for process in range(plan.mesh.size):
        rank = mapping.ranks[process] if mapping is not None and mapping.ranks else process
        place, slot = divmod(process, per_node)
        found[rank] = nodes[order[place]] * per_node + slot
    return tuple(found)


def _overlap(new: Sequence[Region], old: Sequence[Region]) -> Bytes:
    """(new, old): elements that two regions have in common."""
    total = np.ones((len(new), len(old)))
    for dim in range(len(new[0].dims)):
        a, b = _padded(new, dim)[:, None, :, None], _padded(old, dim)[None, :, None, :]
        length = np.minimum(a[..., 1], b[..., 1]) - np.maximum(a[..., 0], b[..., 0])
        total *= np.maximum(length, 0).sum(axis=(2, 3))
    return total


def _padded(regions: Sequence[Region], dim: int) -> NDArray[np.int64]:
    """(regions, intervals, 2): intervals of a dim, filled up with empty ones."""
    most = max(len(region.dims[dim]) for region in regions)
    found = np.zeros((len(regions), most, 2), np.int64)
    for i, region in enumerate(regions):
        if region.dims[dim]:
            found[i, : len(region.dims[dim])] = region.dims[dim]
    return found


def _seconds(moves: Sequence[Move], cluster: Cluster) -> float:
    """The busiest device's: what it sends and receives runs at once, inside its node and beyond one
    after the other."""
    per_node = cluster.devices_per_node
    traffic: dict[tuple[int, bool, bool], int] = defaultdict(int)  # device, sends, leaves the node
    for move in moves:
        if move.source is not None:
            away = move.source // per_node != move.target // per_node
            traffic[move.source, True, away] += move.bytes
            traffic[move.target, False, away] += move.bytes
    rates = {False: float("inf"), True: cluster.worst_levels[-1].reached_bytes_per_s(1)}
    if per_node > 1:
        rates[False] = cluster.pair(0, 1).bandwidth_bytes_per_s
    busy: dict[int, float] = defaultdict(float)
    for device in {device for device, _, _ in traffic}:
        for away, rate in rates.items():
            most = max(traffic[device, True, away], traffic[device, False, away])
            busy[device] += most / rate
    return max(busy.values(), default=0.0)
