"""Devices, nodes and the links between them, as a hierarchy of levels.

A *level* joins `span_devices` neighbouring ranks: innermost the GPUs of a node over NVLink,
outermost all nodes over the NICs. Ranks are laid out node by node. A cluster is a few lines however
many devices it has. Presets with their sources are in `data/clusters.yaml`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..ir.errors import InvalidInput
from . import yaml_files
from .device import Device

_SPEC = re.compile(r"(?P<name>[^:/\\]+)(?::(?P<nodes>\d+)(?:x(?P<devices>\d+))?)?")
_SPEC_HELP = "expected PRESET:NODES, PRESET:NODESxGPUS (a100-40g:4x8) or a cluster file (.yaml)"
_MOST = 1_000_000
"""Nodes, and devices of one: a slip of the keyboard rather than a cluster beyond that."""
_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Level(BaseModel):
    """Links of one level.

    `bandwidth_bytes_per_s` is what *one device* can send to the rest of the level, one direction,
    nominal: on the NIC level the device's share of its node's NICs. `achieved_fraction` of it is
    what large messages reach. `pair_bandwidth_bytes_per_s` is the nominal limit between two
    devices where links are point to point rather than switched. `latency_s` is the cost of one
    step of a collective. `span_devices` is the number of devices joined.
    """

    model_config = _FROZEN

    name: str
    span_devices: int = Field(ge=1)
    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    pair_bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    achieved_fraction: float = Field(default=0.8, gt=0, le=1)

    def reached_bytes_per_s(self, peers: int) -> float:
        """What one device sends to `peers` others of its level at once, with large messages."""
        nominal = self.bandwidth_bytes_per_s
        if self.pair_bandwidth_bytes_per_s is not None:
            nominal = min(nominal, peers * self.pair_bandwidth_bytes_per_s)
        return nominal * self.achieved_fraction


class Cluster(BaseModel):
    """Equal nodes of equal devices, and the levels that join them, innermost first.

    In a file `span_devices` may be a number or the word `node` or `cluster`, and `device` the name
    of a preset or a mapping of a device's fields.
    """

    model_config = _FROZEN

    name: str
    device: Device
    nodes: int = Field(ge=1, le=_MOST)
    devices_per_node: int = Field(ge=1, le=_MOST)
    levels: tuple[Level, ...] = Field(min_length=1)

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node

    @field_validator("device", mode="before")
    @classmethod
    def _device_by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return Device.preset(value)
        except InvalidInput as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _resolve_words(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        nodes, per_node, levels = (data.get(k) for k in ("nodes", "devices_per_node", "levels"))
        if isinstance(nodes, int) and isinstance(per_node, int) and isinstance(levels, list):
            words = {"node": per_node, "cluster": nodes * per_node}
            data["levels"] = [_with_span(level, words) for level in levels]
        return data

    @model_validator(mode="after")
    def _levels_nest(self) -> Cluster:
        inner = 1
        for i, level in enumerate(self.levels):
            if level.span_devices % inner:
                raise ValueError(
                    f"levels[{i}].span_devices is {level.span_devices}, expected a multiple of "
                    f"{inner}, the span of the level inside it"
                )
            inner = level.span_devices
        if inner != self.world_size:
            raise ValueError(
                f"levels[{len(self.levels) - 1}].span_devices is {inner}, expected the whole "
                f"cluster: {self.nodes} nodes x {self.devices_per_node} = {self.world_size}"
            )
        return self

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
            data["levels"] = _fitted(data["levels"], nodes, per_node)
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
        data = self.model_dump(exclude_none=True)
        data["levels"] = list(data["levels"])
        for level in data["levels"]:
            if level["span_devices"] == self.devices_per_node:
                level["span_devices"] = "node"
        data["levels"][-1]["span_devices"] = "cluster"
        yaml_files.save(data, path)


def _with_span(level: Any, words: Mapping[str, int]) -> Any:
    if not isinstance(level, Mapping):
        return level
    span = level.get("span_devices")
    return {**level, "span_devices": words[span]} if span in ("node", "cluster") else level


def _fitted(levels: list[Any], nodes: int, per_node: int) -> list[Any]:
    """Preset levels with numeric spans adapted to a job of `nodes` x `per_node` devices."""
    fitted = []
    for level in levels:
        span = level["span_devices"]
        if isinstance(span, int):
            if span < per_node and per_node % span:
                continue
            if span >= per_node:
                fitting = range(1, min(nodes, span // per_node) + 1)
                span = per_node * max(k for k in fitting if nodes % k == 0)
        fitted.append({**level, "span_devices": span})
    return fitted
