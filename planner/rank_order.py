"""Which rank of a plan goes to which device, so that most of what ranks keep is there already.

Launchers start ranks on the devices of a node in order, and a program may number its processes
anew before it makes its mesh (`NodeMapping.ranks`). Free is what leaves the step as it was priced:

- nodes that are alike may take each other's places;
- within a stage the *units* (the ranks of one data-parallel coordinate, a tensor-parallel group)
  may change places: every tensor- and data-parallel group keeps the devices that it had, as a
  group. A unit that hands activations to the next stage then finds it elsewhere; where stages fill
  whole nodes under a single level of network that is another node before and after. Otherwise all
  stages change places alike, and every pipeline keeps its devices too.

Where links differ, plans are priced on the rings that their ranks make in order: then units change
places within a node only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ..costmodel.cluster import Cluster
from ..ir.plan import Plan

Bytes = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Seats:
    """The devices that the ranks of a plan may take, and what they would find there.

    `kept` is (ranks, devices) in bytes; devices count node by node in `cluster`'s numbers, `nodes`
    are those that may be used.
    """

    plan: Plan
    cluster: Cluster
    nodes: tuple[int, ...]
    kept: Bytes

    @property
    def per_node(self) -> int:
        return self.cluster.devices_per_node

    @property
    def places(self) -> int:
        """Nodes that the plan takes."""
        return -(-self.plan.mesh.size // self.per_node)

    @property
    def unit(self) -> int:
        """Ranks of one data-parallel coordinate of a stage."""
        strategy = self.plan.strategy
        return self.plan.mesh.size // (strategy.pp * strategy.dp)

    @property
    def whole(self) -> bool:
        """Whether every stage fills nodes, and all nodes are equally far from each other."""
        stage = self.plan.mesh.size // self.plan.strategy.pp
        beyond = [at for at in self.cluster.worst_levels if at.span_devices > self.per_node]
        return stage % self.per_node == 0 and len(beyond) <= 1

    @property
    def movable(self) -> bool:
        """Whether units of a stage are alike: not where some of them form groups of their own."""
        strategy = self.plan.strategy
        groups = strategy.zero_group or strategy.gradient_group or strategy.parameter_group
        return strategy.ep * strategy.etp == 1 and not groups

    def found(self, device_of: Sequence[int]) -> float:
        """Bytes that ranks on these devices find."""
        return float(self.kept[np.arange(len(device_of)), list(device_of)].sum())

    def in_order(self, node_of: Sequence[int]) -> tuple[int, ...]:
        """The device of every rank, places on these nodes and ranks in order."""
        each = self.per_node
        return tuple(node_of[r // each] * each + r % each for r in range(self.plan.mesh.size))

    def nodes_in_order(self) -> tuple[int, ...]:
        """The node of every place, so that most of what its ranks keep is there in order."""
        each = self.per_node
        gain = np.zeros((self.places, len(self.nodes)))
        for k, node in enumerate(self.nodes):
            for slot in range(each):
                of_slot = self.kept[slot::each, node * each + slot]
                gain[: len(of_slot), k] += of_slot
        return tuple(self.nodes[k] for k in assigned(gain))

    def nodes_for_stages(self) -> tuple[int, ...]:
        """The same where units may change places within a stage: nodes go to the stage whose units
        find most there, were they the only ones."""
        if not (self.whole and self.movable) or self.per_node % self.unit:
            return self.nodes_in_order()
        pp, dp = self.plan.strategy.pp, self.plan.strategy.dp
        ranks = np.arange(pp * dp * self.unit).reshape(pp, dp, self.unit)
        gain = np.zeros((pp, len(self.nodes)))
        for k, node in enumerate(self.nodes):
            devices = np.arange(node * self.per_node, (node + 1) * self.per_node)
            for stage in range(pp):
                found = self._units(ranks[stage], devices.reshape(-1, self.unit))
                rows, columns = linear_sum_assignment(found, maximize=True)
                gain[stage, k] = found[rows, columns].sum()
        each = self.places // pp
        return tuple(self.nodes[k] for k in assigned(np.repeat(gain, each, axis=0)))

    def _units(self, ranks: Ints, devices: Ints) -> Bytes:
        """(units, runs of devices): what units of ranks would find, one rank on one device."""
        pairs = zip(ranks.T, devices.T, strict=True)
        total: Bytes = np.sum([self.kept[np.ix_(r, d)] for r, d in pairs], axis=0)
        return total

    def exchanged(self, device_of: Sequence[int], anywhere: bool) -> tuple[int, ...]:
        """The same devices, units on those of each other where that keeps more: `anywhere` in their
        stage, or only within their node."""
        if not self.movable:
            return tuple(device_of)
        pp, dp = self.plan.strategy.pp, self.plan.strategy.dp
        devices = np.array(device_of).reshape(pp, dp, self.unit)
        ranks, result = np.arange(devices.size).reshape(devices.shape), devices.copy()
        alone = self.whole or pp == 1
        for stages in [slice(s, s + 1) for s in range(pp)] if alone else [slice(0, pp)]:
            here = devices[stages].swapaxes(0, 1).reshape(dp, -1)  # per coordinate of dp
            those = ranks[stages].swapaxes(0, 1).reshape(dp, -1)
            groups: dict[Hashable, list[int]] = defaultdict(list)
            for d in range(dp):
                groups[None if anywhere else tuple(here[d] // self.per_node)].append(d)
            for group in groups.values():
                to = assigned(self._units(those[group], here[group]))
                moved = here[group][to].reshape(len(group), -1, self.unit)
                result[stages][:, group] = moved.swapaxes(0, 1)
        better = tuple(result.ravel().tolist())
        return better if self.found(better) > self.found(device_of) else tuple(device_of)

    def best(self, given: Sequence[int] | None) -> tuple[int, ...]:
        """The device of every rank. `given` is the node of every place where links decide that."""
        if given is not None:
            return self.exchanged(self.in_order(given), anywhere=False)
        options = dict.fromkeys((self.nodes_in_order(), self.nodes_for_stages()))
        every = [self.exchanged(self.in_order(nodes), anywhere=True) for nodes in options]
        return max(every, key=self.found)


def assigned(gain: Bytes) -> list[int]:
    """For every row a column of its own, so that the sum is largest; there are enough columns."""
    _, columns = linear_sum_assignment(gain, maximize=True)
    return [int(column) for column in columns]
