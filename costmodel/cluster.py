"""Devices, nodes and the links between them, as a hierarchy of levels.

A *level* joins `span_devices` neighbouring ranks: innermost the GPUs of a node over NVLink,
outermost all nodes over the NICs. Ranks are laid out node by node. A cluster is a few lines however
many devices it has. *Islands* are runs of nodes with a device or a network of their own; `pairs`,
`degraded`, `matrix` and `curves` say where links differ from their level, and what was measured.
Presets with their sources are in `data/clusters.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..ir.errors import InvalidInput
from . import cluster_file, consistency, yaml_files
from .curves import Curve
from .device import Device
from .efficiency import ComputeDtype
from .islands import Degraded, Island, NamedDevice
from .levels import Level, slowest_level
from .links import Link, Links, island_of_node, links_of
from .notes import notes_on
from .pairs import Pair, PairMatrix
from .yaml_files import Misfit

__all__ = ["Cluster", "Degraded", "Island", "Level", "Link", "Pair", "PairMatrix"]

_SPEC = re.compile(r"(?P<name>[^:/\\]+)(?::(?P<nodes>\d+)(?:x(?P<devices>\d+))?)?")
_SPEC_HELP = "expected PRESET:NODES, PRESET:NODESxGPUS (a100-40g:4x8) or a cluster file (.yaml)"
_MOST = 1_000_000
"""Nodes, and devices of one: a slip of the keyboard rather than a cluster beyond that."""


class Cluster(BaseModel):
    """Nodes of equally many devices, and the levels that join them, innermost first.

    In a file `span_devices` may be a number or the word `node`, `island` or `cluster`, `device`
    the name of a preset or a mapping of a device's fields, and `nodes` may be left out where
    `islands` say it. `device` is that of nodes whose island names none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    device: NamedDevice
    nodes: int = Field(ge=1, le=_MOST)
    devices_per_node: int = Field(ge=1, le=_MOST)
    levels: tuple[Level, ...] = Field(min_length=1)
    islands: tuple[Island, ...] = ()
    pairs: tuple[Pair, ...] = ()
    degraded: tuple[Degraded, ...] = ()
    matrix: PairMatrix | None = None
    curves: tuple[Curve, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node

    @cached_property
    def device_kinds(self) -> tuple[Device, ...]:
        """The different devices that the cluster has, in the order of their first rank."""
        kinds = [island.device or self.device for island in self.islands] or [self.device]
        return tuple(dict.fromkeys(kinds))

    @cached_property
    def island_levels(self) -> tuple[tuple[Level, ...], ...]:
        """The levels as they are in each island; one entry where the cluster has no islands."""
        every = []
        for island in self.islands:
            changes = {change.name: change for change in island.levels}
            every.append(
                tuple(
                    level.changed(changes[level.name]) if level.name in changes else level
                    for level in self.levels
                )
            )
        return tuple(every) or (self.levels,)

    @cached_property
    def worst_levels(self) -> tuple[Level, ...]:
        """Each level as slow as its slowest island, slowest degraded node and slowest joint make
        it: what groups that lie everywhere at once, those of a mesh axis, must reckon with.

        Equal to `levels` in a uniform cluster. Entries of two nodes or two devices and the matrix
        are left out: a group can be laid so that neighbours avoid them (`slowest_link` asks).
        """
        island = island_of_node(self)
        fractions = [1.0] * len(self.island_levels)
        for entry in self.degraded:
            for node in entry.nodes:
                at = int(island[node])
                fractions[at] = min(fractions[at], entry.bandwidth_fraction)
        worst = []
        for i, level in enumerate(self.levels):
            leaves_node = level.whole_island or level.span_devices > self.devices_per_node
            variants = [
                levels[i].slowed(fraction if leaves_node else 1.0)
                for levels, fraction in zip(self.island_levels, fractions, strict=True)
            ]
            worst.append(slowest_level(tuple(variants + self._joints(i, fractions))))
        return tuple(worst)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a plan on this cluster should know: asymmetry, noise, slow links."""
        return notes_on(self)

    def peak_flops_per_s(self, dtype: ComputeDtype) -> float:
        """The peaks of all devices together, degraded ones counted as whole."""
        if not self.islands:
            return self.world_size * self.device.peak(dtype)
        return sum(
            island.nodes * self.devices_per_node * (island.device or self.device).peak(dtype)
            for island in self.islands
        )

    def device_of(self, rank: int) -> Device:
        """The device of a rank; raises InvalidInput for an unknown rank."""
        island = self.island_of(rank)
        return self.device if island is None else island.device or self.device

    def island_of(self, rank: int) -> Island | None:
        """The island of a rank, if the cluster has any; raises InvalidInput for an unknown rank."""
        node = self._node(rank)
        return self.islands[int(self._links.island_of_node[node])] if self.islands else None

    def compute_fraction(self, rank: int) -> float:
        """What a rank's node has of the speed of its kind: 1 unless it is degraded."""
        node = self._node(rank)
        return min((e.compute_fraction for e in self.degraded if node in e.nodes), default=1.0)

    def pair(self, source: int, target: int) -> Link:
        """The link from one rank to another, as measured or else as its level has it.

        Raises InvalidInput for unknown or equal ranks.
        """
        return self._links.pair(source, target)

    def slowest_link(self, ranks: Iterable[int]) -> Link:
        """The link of least bandwidth between any two of the ranks, in time linear in them.

        Raises InvalidInput for fewer than two ranks, or an unknown one.
        """
        return self._links.slowest(ranks)

    def node_links(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nodes, nodes) latencies in s and bandwidths in bytes/s between devices of two nodes.

        What the levels promise, with islands, degraded nodes and entries of nodes, and of a matrix
        how its pairs compare with the fastest of their kind; 0 and infinite on the diagonal.
        """
        return self._links.between_nodes()

    def with_curves(self, curves: Iterable[Curve]) -> Cluster:
        """The cluster with measured curves, in place of those of the same collective and shape.

        Raises InvalidInput for a shape that does not fit.
        """
        merged = {(c.collective, tuple(c.shape)): c for c in (*self.curves, *curves)}
        return self._with(curves=tuple(merged.values()))

    def with_device(self, device: Device) -> Cluster:
        """The cluster with another device (calibrated, say); islands keep those of their own."""
        return self._with(device=device)

    def at_slowest(self) -> Cluster:
        """The cluster as if every device were the slowest and the smallest of its kinds, degraded
        ones included: what a job takes in which all do the same work."""
        slowed = min((d.compute_fraction for d in self.degraded), default=1.0)
        if slowed == 1.0 and len(self.device_kinds) == 1 and self.device_kinds[0] == self.device:
            return self
        return self._with(device=Device.worst(self.device_kinds, slowed))

    def with_pairs(self, measured: PairMatrix | Iterable[Pair]) -> Cluster:
        """The cluster with a measured matrix, or with entries of pairs in place of those of the
        same ends.

        Raises InvalidInput for nodes, devices or islands that it does not have.
        """
        if isinstance(measured, PairMatrix):
            return self._with(matrix=measured)
        merged = {(pair.kind, pair.ends): pair for pair in (*self.pairs, *measured)}
        return self._with(pairs=tuple(merged.values()))

    def resized(self, nodes: int) -> Cluster:
        """A cluster of the same kind with another number of nodes.

        The last islands shrink, go or grow; levels across nodes adapt as in `preset`; what is said
        of nodes that are gone goes. Raises InvalidInput below 1.
        """
        if nodes == self.nodes:
            return self
        where = f"cluster {self.name}"
        if nodes < 1:
            raise InvalidInput(f"{where}: nodes is {nodes}, expected at least 1")
        return yaml_files.validated(Cluster, cluster_file.resized(self, nodes), where)

    def without(self, nodes: Iterable[int]) -> Cluster:
        """The cluster without some of its nodes; those left are numbered anew, in order.

        Islands shrink or go; a level across nodes joins as many as were joined before and divide
        those left. Raises InvalidInput for a node that is not there, or where none would be left.
        """
        lost, where = frozenset(nodes), f"cluster {self.name}"
        for node in sorted(lost):
            if not 0 <= node < self.nodes:
                raise InvalidInput(f"{where}: node {node}: expected 0 to {self.nodes - 1}")
        if len(lost) == self.nodes:
            raise InvalidInput(f"{where}: all {self.nodes} nodes are lost, expected one left")
        if not lost:
            return self
        return yaml_files.validated(Cluster, cluster_file.without(self, lost), where)

    @staticmethod
    def preset(name: str, nodes: int = 1, devices_per_node: int | None = None) -> Cluster:
        """A published kind of cluster.

        A level inside the node that does not divide `devices_per_node` is left out; one across
        nodes (an NVLink rack) joins as many whole nodes as fit it and divide the job.
        Raises InvalidInput with the nearest names if unknown, or if a count is below 1.
        """
        table = yaml_files.packaged("clusters")
        data = dict(yaml_files.pick(table, name, "cluster preset"))
        per_node = data["devices_per_node"] if devices_per_node is None else devices_per_node
        data |= {"name": name, "nodes": nodes, "devices_per_node": per_node}
        if nodes >= 1 and per_node >= 1:
            data["levels"] = cluster_file.fitted(data["levels"], nodes, per_node)
        if "curves" in data:  # those of groups that this many devices can form
            measured = yaml_files.packaged("curves")[data["curves"]]["curves"]
            most = (per_node, nodes)
            data["curves"] = [
                curve
                for curve in measured
                if all(units <= room for units, room in zip(curve["shape"], most, strict=False))
            ]
        return yaml_files.validated(Cluster, data, f"cluster {name}")

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names that `preset` takes, in the order of the data file."""
        return tuple(yaml_files.packaged("clusters"))

    @staticmethod
    def parse(spec: str) -> Cluster:
        """`h100-sxm:16`, `a100-40g:4x8`, `h200` (one node) or the path of a cluster file.

        Raises InvalidInput for anything else.
        """
        spec = spec.strip()
        if spec.lower().endswith((".yaml", ".yml")) or Path(spec).is_file():
            return Cluster.load(spec)
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise InvalidInput(f"cluster {spec!r}: {_SPEC_HELP}")
        devices = match["devices"]
        return Cluster.preset(
            match["name"], int(match["nodes"] or 1), int(devices) if devices else None
        )

    @staticmethod
    def load(path: str | Path) -> Cluster:
        """Reads a cluster file; raises InvalidInput naming field, value, expected and line."""
        return yaml_files.load(Cluster, path)

    def save(self, path: str | Path) -> None:
        """Writes a cluster file that `load` reads; spans that follow from the shape as words."""
        yaml_files.save(cluster_file.as_file(self), path)

    # Searches look clusters up in dictionaries; hashing every curve each time would dominate.
    def __hash__(self) -> int:
        return self._hash

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Cluster:
        """As pydantic's, without what was derived from the fields before the update."""
        copied = super().model_copy(update=update, deep=deep)
        for derived in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[derived]
        return copied

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field) for field in type(self).model_fields))

    @cached_property
    def _links(self) -> Links:
        return links_of(self)

    def _node(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise InvalidInput(f"rank {rank}: expected 0 to {self.world_size - 1}")
        return rank // self.devices_per_node

    def _joints(self, i: int, fractions: Sequence[float]) -> list[Level]:
        """Level `i` as the entries of two islands that meet there have it."""
        index = {island.name: k for k, island in enumerate(self.islands)}
        ends = [0, *accumulate(island.nodes * self.devices_per_node for island in self.islands)]
        joints = []
        for pair in self.pairs:
            if pair.islands is None:
                continue
            first, second = sorted(index[name] for name in pair.islands)
            nearest = self._links.meet(ends[first + 1] - 1, ends[second])
            farthest = self._links.meet(ends[first], ends[second + 1] - 1)
            if not nearest <= i <= farthest or self.levels[i].whole_island:
                continue
            both = tuple(self.island_levels[k][i].slowed(fractions[k]) for k in (first, second))
            joint = slowest_level(both).slowed(pair.bandwidth_fraction or 1.0)
            if pair.bandwidth_bytes_per_s is not None:
                nominal = pair.bandwidth_bytes_per_s / joint.achieved_fraction
                joint = joint.model_copy(update={"bandwidth_bytes_per_s": nominal})
            if pair.latency_s is not None:
                joint = joint.model_copy(update={"latency_s": pair.latency_s})
            joints.append(joint)
        return joints

    def _with(self, **fields: Any) -> Cluster:
        data = {name: getattr(self, name) for name in type(self).model_fields} | fields
        return yaml_files.validated(Cluster, data, f"cluster {self.name}")

    @field_validator("nodes", "devices_per_node", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):  # what YAML makes of yes and no
            raise Misfit(f"is {str(value).lower()}, expected a whole number")
        return value

    @model_validator(mode="before")
    @classmethod
    def _resolve_words(cls, data: Any) -> Any:
        return cluster_file.without_words(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _agrees(self) -> Cluster:
        consistency.check(self)
        return self
