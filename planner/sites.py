"""The parts of a cluster that pipeline ranks lie on: islands of other devices or other networks.

Ranks are started node by node, so a pipeline rank is a run of nodes. One that lies within an island
computes at the island's pace and communicates over the island's links; one that lies across
several, at the pace and over the links of the slowest.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.links import island_of_node
from .candidates import Candidate


@dataclass(frozen=True, slots=True)
class Sites:
    """A cluster as its pipeline ranks see it. `whole` is the cluster at the pace of its slowest,
    which is what every rank sees where all nodes are of one kind."""

    hardware: Cluster
    whole: Cluster
    kind_of: tuple[Hashable, ...]
    _views: dict[frozenset[Hashable], Cluster] = field(default_factory=dict)

    @staticmethod
    def of(hardware: Cluster, whole: Cluster) -> Sites:
        """Nodes are of one kind that have the same island and as much of their arithmetic left."""
        if not hardware.islands and all(entry.compute_fraction == 1 for entry in hardware.degraded):
            return Sites(hardware, whole, ())
        left = np.ones(hardware.nodes)
        for entry in hardware.degraded:
            nodes = list(entry.nodes)
            left[nodes] = np.minimum(left[nodes], entry.compute_fraction)
        islands = island_of_node(hardware)
        kinds = tuple(zip(islands.tolist(), left.tolist(), strict=True))
        return Sites(hardware, whole, kinds if len(set(kinds)) > 1 else ())

    @property
    def alike(self) -> bool:
        """Whether all nodes are of one kind."""
        return not self.kind_of

    def views(self, candidate: Candidate) -> tuple[Cluster, ...]:
        """The cluster of every pipeline rank; ranks on nodes of the same kinds share one."""
        if self.alike:
            return (self.whole,) * candidate.pp
        found = []
        for rank in range(candidate.pp):
            per_rank = candidate.ranks // candidate.pp
            first = rank * per_rank // self.hardware.devices_per_node
            last = ((rank + 1) * per_rank - 1) // self.hardware.devices_per_node
            found.append(self._view(frozenset(self.kind_of[first : last + 1])))
        return tuple(found)

    def _view(self, kinds: frozenset[Hashable]) -> Cluster:
        if kinds not in self._views:
            others = [node for node, kind in enumerate(self.kind_of) if kind not in kinds]
            self._views[kinds] = self.hardware.without(others).at_slowest()
        return self._views[kinds]
