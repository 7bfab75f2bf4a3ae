"""What a configuration sends between the nodes of a cluster, and what it takes where it is placed.

The cost model prices a mesh axis by the slowest level it crosses. Here its seconds are laid on the
links that it really uses: activations go from a stage to the next, the data-parallel ranks of a
stage form a ring, and so do tensor-parallel ranks that do not fit a node. A link that is slower or
faster than the level takes so much longer or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Group, hops
from ..ir.plan import NodeMapping
from .candidates import Candidate, placement_of
from .mapping import Array, Flow, Ints, flow_seconds, map_places

MOST_NODES = 1024
"""Nodes of the largest cluster whose links are looked at one by one."""


@dataclass(frozen=True, slots=True)
class StageTraffic:
    """Seconds of a step that one (virtual) stage communicates: its data-parallel group once for
    all, its tensor-parallel group, and handing activations and gradients to the next stage."""

    data_s: float
    tensor_s: float
    next_s: float


@dataclass(frozen=True, slots=True)
class Slowdown:
    """What the links of a mapping do to communication, as factors of the cost model's seconds: per
    (virtual) stage of its data- and its tensor-parallel group, per boundary of what is handed on.
    """

    data: tuple[float, ...]
    tensor: tuple[float, ...]
    boundary: tuple[float, ...]


def has_choice(cluster: Cluster) -> bool:
    """Whether it matters which node takes which place, and can be looked at."""
    return 1 < cluster.nodes <= MOST_NODES and bool(
        cluster.pairs or cluster.matrix or cluster.islands or cluster.degraded
    )


def slowness_of(cluster: Cluster) -> Array:
    """(nodes, nodes): how much longer a link takes than the outermost level, as axes are priced by
    it; 0 on the diagonal."""
    _, bandwidth = cluster.node_links()
    found: Array = cluster.worst_levels[-1].reached_bytes_per_s(1) / bandwidth
    return found


def mapped(
    cluster: Cluster, candidate: Candidate, stages: Sequence[StageTraffic], seed: int = 0
) -> tuple[NodeMapping, Slowdown]:
    """The best mapping of a configuration found, and what its links do to communication."""
    slowness, routes = slowness_of(cluster), _Routes(cluster, candidate, None)
    places = -(-candidate.ranks // cluster.devices_per_node)
    found = map_places(routes.flows(stages), places, slowness, seed)
    return found, routes.slowdown(found.node_of, slowness)


def in_order(
    cluster: Cluster,
    candidate: Candidate,
    views: Sequence[Cluster] | None = None,
    node_of: Sequence[int] | None = None,
) -> Slowdown | None:
    """What links do to communication where ranks are started node by node, in order (or in that of
    `node_of`); None where all are as axes are priced. `views` are the clusters by which the groups
    of each pipeline rank are priced, where these differ (`sites`)."""
    if not has_choice(cluster):
        return None
    order = range(cluster.nodes) if node_of is None else node_of
    return _Routes(cluster, candidate, views).slowdown(order, slowness_of(cluster))


class _Routes:
    """Which places a configuration's groups lie on. Scales turn the cost model's seconds of a
    group, priced by the outermost level it crosses, into seconds on the cluster's outermost."""

    def __init__(
        self, cluster: Cluster, candidate: Candidate, views: Sequence[Cluster] | None
    ) -> None:
        self.candidate = candidate
        self.placement = placement_of(candidate)
        outermost = cluster.worst_levels[-1].reached_bytes_per_s(1)
        known = {
            id(view): (_crossed(view, candidate.data), _crossed(view, Group(candidate.tp)))
            for view in (views or [cluster])
        }
        crossed = [known[id(view)] for view in (views or [cluster] * candidate.pp)]
        self.data_scale = [data / outermost if data else 1.0 for data, _ in crossed]
        self.tensor_scale = [tensor / outermost if tensor else 1.0 for _, tensor in crossed]
        pipe = _crossed(cluster, candidate.pipe)
        self.pipe_scale = pipe / outermost if pipe else 1.0
        per_stage = candidate.replicas * candidate.tp
        place = np.arange(candidate.pp * per_stage) // cluster.devices_per_node
        self.place = place.reshape(candidate.pp, candidate.replicas, candidate.tp)

    def data(self, rank: int) -> Ints:
        """(edges, 2): the rings of a pipeline rank's data-parallel groups."""
        here = self.place[rank]
        return _edges(here, np.roll(here, -1, axis=0))

    def tensor(self, rank: int) -> Ints:
        """(edges, 2): the rings of a pipeline rank's tensor-parallel groups."""
        here = self.place[rank]
        return _edges(here, np.roll(here, -1, axis=1))

    def boundary(self, stage: int) -> Ints:
        """(edges, 2): from the ranks of a (virtual) stage to those of the next."""
        return _edges(self.place[self.placement[stage]], self.place[self.placement[stage + 1]])

    def slowdown(self, node_of: Sequence[int], slowness: Array) -> Slowdown:
        """The factors of every stage and boundary under a mapping."""

        def factor(ends: Ints, scale: float) -> float:
            """What the slowest link of a group makes of its seconds; 1 for one within a node."""
            each = flow_seconds(Flow("", ends, np.full(len(ends), scale)), node_of, slowness)
            return float(each.max(initial=0.0)) or 1.0

        ranks = self.placement
        return Slowdown(
            tuple(factor(self.data(rank), self.data_scale[rank]) for rank in ranks),
            tuple(factor(self.tensor(rank), self.tensor_scale[rank]) for rank in ranks),
            tuple(factor(self.boundary(v), self.pipe_scale) for v in range(len(ranks) - 1)),
        )

    def flows(self, stages: Sequence[StageTraffic]) -> list[Flow]:
        """All that a step sends between places. What stages do at the same time is one flow, whose
        slowest stage counts; boundaries are crossed one after the other."""
        found = []
        for name, edges_of, scales, taken in (
            ("data", self.data, self.data_scale, [stage.data_s for stage in stages]),
            ("tensor", self.tensor, self.tensor_scale, [stage.tensor_s for stage in stages]),
        ):
            seconds = np.bincount(self.placement, taken, minlength=self.candidate.pp)
            ends = [edges_of(rank) for rank in range(self.candidate.pp)]
            weights = [
                np.full(len(e), scale * s)
                for e, scale, s in zip(ends, scales, seconds, strict=True)
            ]
            found.append(Flow(name, np.concatenate(ends), np.concatenate(weights)))
        for v, stage in enumerate(stages[:-1]):
            ends_v = self.boundary(v)
            seconds_v = np.full(len(ends_v), self.pipe_scale * stage.next_s)
            found.append(Flow(f"stage {v} to {v + 1}", ends_v, seconds_v))
        return found


def _edges(one: Ints, other: Ints) -> Ints:
    """(edges, 2): the distinct pairs of different places, the lower first."""
    pairs = np.sort(np.stack([one.ravel(), other.ravel()], axis=1), axis=1)
    found: Ints = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    return found


def _crossed(cluster: Cluster, group: Group) -> float:
    """Bytes per second of the outermost level that a group crosses; 0 within a device."""
    path = hops(cluster, group)
    return cluster.worst_levels[path[-1].index].reached_bytes_per_s(1) if path else 0.0
