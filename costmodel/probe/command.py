"""`torchrun … -m shardwright probe`: measures every link and writes a cluster file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from rich.console import Console

from ...ir.errors import InvalidInput
from ..calibrate import calibrated
from ..calibrate.command import checked_kind
from ..calibrate.machine import machine
from ..cluster import Cluster
from ..device import Device
from ..ranks import Launch, Team, check_writable, launched, progress, team_of, write_whole
from .cluster_of import cluster_of
from .findings import Findings, findings
from .rounds import Nodes, nodes_of
from .run import Measured, measured
from .table import report as report_of

PROBE_S = 75.0
"""Default time for measuring: with starting and writing, 16 ranks on two cores stay under two
minutes."""
JOIN_S = 120.0
_CALIBRATE_FRACTION = 0.2
"""Of the time, where the device has no file and no preset."""
_MEMORY_FRACTION = 0.5
"""Of what is free: libraries keep buffers as large as the message."""


def run_probe(
    output: str | Path = "cluster.yaml",
    *,
    device: str = "",
    budget_s: float = PROBE_S,
    wait_s: float = JOIN_S,
    seed: int = 0,
    on: str = "auto",
    environ: Mapping[str, str] = os.environ,
    debug: bool = False,
) -> None:
    """Measures the links between all ranks and writes a cluster file; every rank calls it.

    `device` is a device file or the name of a preset; without, a GPU is known by its name, and
    what is not known is calibrated, all ranks at once. `wait_s` is how long to wait for ranks to
    come, `seed` that of the random order, `on` auto, cpu or cuda.

    Raises InvalidInput on rank 0 (and ends the others) where the environment, a flag or a file is
    not what it should be, or ranks do not come. A rank that dies ends all with exit code 2 and one
    line that names it.
    """
    kind = checked_kind(on)
    for flag, seconds in (("--budget", budget_s), ("--wait", wait_s)):
        if not seconds > 0:
            raise InvalidInput(f"{flag} is {seconds:g}, expected seconds above 0")
    launch = launched(environ, "probe")
    if launch.world_size < 2:
        raise InvalidInput(
            "probe: world size is 1, expected two ranks at least: start it with "
            "torchrun --nproc-per-node N -m shardwright probe"
        )
    given = _given_device(device, launch)
    with team_of(launch, wait_s, kind, debug) as team:
        if team.leads:
            check_writable(output)
        nodes = nodes_of(team.hosts)
        found = probed(team, nodes, given, budget_s, seed)
        if found is not None:
            cluster, made, seen = found
            write_whole(output, cluster.save)
            Console(width=100, highlight=False).print(report_of(made, seen), f"wrote {output}")


def probed(
    team: Team, nodes: Nodes, device: Device | None, budget_s: float, seed: int
) -> tuple[Cluster, Findings, Measured] | None:
    """Measures for about `budget_s` seconds; the cluster and what it was made of, on rank 0."""
    device = device or team.told(lambda: _known_gpu(team))
    if device is None:
        calibrate_s = budget_s * _CALIBRATE_FRACTION
        with progress(team, "calibrate") as report:
            done = calibrated(team, (), calibrate_s, report)
        budget_s -= calibrate_s
        device = done[0] if done else None
    free_bytes = min(team.gathered(machine(team).free_bytes), default=0)
    memory_bytes = team.told(lambda: int(free_bytes * _MEMORY_FRACTION))
    with progress(team, "probe") as report:
        seen = measured(team, nodes, budget_s, memory_bytes, seed, report)
    if seen is None or device is None:
        return None
    made = findings(seen, _source(team))
    return cluster_of(made, device, _name(nodes, device)), made, seen


def _given_device(device: str, launch: Launch) -> Device | None:
    if not device:
        return None
    if device.lower().endswith((".yaml", ".yml")) or Path(device).is_file():
        return Device.load(device)
    return Device.preset(device)


def _known_gpu(team: Team) -> Device | None:
    """The preset whose name has every word of the GPU's: `a100`, `80g` in NVIDIA A100-SXM4-80GB."""
    if team.device.type != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name(team.device).lower()
    fitting = [p for p in Device.preset_names() if all(w in name for w in p.split("-"))]
    return Device.preset(max(fitting, key=len)) if fitting else None


def _source(team: Team) -> str:
    library = "nccl" if team.device.type == "cuda" else "gloo"
    return f"probe, {library}, {team.world_size} ranks, {date.today().isoformat()}"


def _name(nodes: Nodes, device: Device) -> str:
    return f"{device.name}-{nodes.nodes}x{nodes.devices_per_node}"
