"""Piper's inputs: problems of `shardwright.planner.stage_problem` as JSON files.

Their format is that of https://github.com/msr-fiddle/piper (MIT licence): layers ("nodes") with
choices ("TMPCs") by tensor-parallel degree, and edges in bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import shardwright as sw
from shardwright.planner.stage_problem import Choice, Edge, Layer, StageProblem


def read_piper(
    path: Path,
    devices: int | None = None,
    microbatches: int | None = None,
    bandwidth_bytes_per_s: float | None = None,
    memory_limit_bytes: float | None = None,
) -> StageProblem:
    """The problem in a file; what is given replaces what the file says.

    Raises InvalidInput where the file is not one of Piper's.
    """
    try:
        raw = json.loads(path.read_text())
        place = {node["id"]: at for at, node in enumerate(raw["nodes"])}
        edges = [
            Edge(place[e["sourceId"]], place[e["destId"]], e["communicationCost"])
            for e in raw["edges"]
        ]
        layers = [_layer(node, place) for node in raw["nodes"]]
        return StageProblem(
            layers,
            edges,
            raw["maxDevices"] if devices is None else devices,
            raw["mbsInBatch"] if microbatches is None else microbatches,
            raw["bandwidth"] if bandwidth_bytes_per_s is None else bandwidth_bytes_per_s,
            raw["maxMemoryPerDevice"] if memory_limit_bytes is None else memory_limit_bytes,
        )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise sw.InvalidInput(f"{path}: {error}; expected one of Piper's JSON files") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise sw.InvalidInput(
            f"{path}: no or a wrong {error}; expected nodes with id and TMPCs, edges with "
            "sourceId, destId and communicationCost"
        ) from error


def _layer(node: dict[str, Any], place: dict[int, int]) -> Layer:
    choices = {
        int(degree): [
            Choice(
                each["timePerSample"], each["parameterSize"], each["memoryUsageA"],
                each["memoryUsageB"],
                {place[int(k)]: v for k, v in each.get("syncTimeFw", {}).items()},
                {place[int(k)]: v for k, v in each.get("syncTimeBw", {}).items()},
            )
            for each in listed
        ]
        for degree, listed in node["TMPCs"].items()
    }  # fmt: skip
    return Layer(f"{node['id']} ({node['name']})", choices)
