"""Who this process is among the ranks that were started, from what a launcher left in the
environment: torchrun's variables, or srun's."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...ir.errors import InvalidInput

_SLURM_PORTS = range(20_000, 50_000)
"""Where a port is picked by job number: jobs that share a machine seldom meet."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One of `world_size` ranks; they find each other at `address`:`port`.

    `agent_store` says that the launcher answers there (torchrun does), else rank 0 must. `attempt`
    names this start among restarts. `host` is the machine's name: ranks with the same one share a
    node.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    host: str
    agent_store: bool = False
    attempt: str = "0"


def launched(environ: Mapping[str, str], command: str) -> Launch:
    """The place of this process, from `RANK`, `WORLD_SIZE`, … or `SLURM_PROCID`, ….

    `command` is what messages tell the user to start. Raises InvalidInput where a variable is
    missing or is no number in its range.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        found = _from_torchrun(environ, command)
    elif "SLURM_PROCID" in environ:
        found = _from_slurm(environ, command)
    else:
        raise InvalidInput(
            f"{command}: RANK is not set, expected one process per device: start it with "
            f"torchrun --nproc-per-node N -m shardwright {command}, or with srun"
        )
    if not 0 <= found.rank < found.world_size:
        raise InvalidInput(
            f"{command}: rank is {found.rank}, expected 0 to {found.world_size - 1} "
            f"(world size {found.world_size})"
        )
    return found


def _from_torchrun(environ: Mapping[str, str], command: str) -> Launch:
    rank = _number(environ, "RANK", command)
    return Launch(
        rank=rank,
        world_size=_number(environ, "WORLD_SIZE", command, least=1),
        local_rank=_number(environ, "LOCAL_RANK", command) if "LOCAL_RANK" in environ else rank,
        address=_text(environ, "MASTER_ADDR", command),
        port=_number(environ, "MASTER_PORT", command, least=1, most=65_535),
        host=socket.gethostname(),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _from_slurm(environ: Mapping[str, str], command: str) -> Launch:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    rank = _number(environ, "SLURM_PROCID", command)
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", command, least=1, most=65_535)
    else:
        job = _number(environ, "SLURM_JOB_ID", command)
        port = _SLURM_PORTS[job % len(_SLURM_PORTS)]
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_NODELIST"
    address = environ.get("MASTER_ADDR") or first_host(_text(environ, nodes, command))
    return Launch(
        rank=rank,
        world_size=_number(environ, tasks, command, least=1),
        local_rank=_number(environ, "SLURM_LOCALID", command),
        address=address,
        port=port,
        host=socket.gethostname(),
        attempt=environ.get("SLURM_STEP_ID", "0"),
    )


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `gpu[003-017,21],login` gives `gpu003`."""
    name = ""
    for part in re.finditer(r"[^,\[\]]+|\[([^\]]*)\]|,", nodes):
        if part[0] == ",":
            break
        name += re.split(r"[,-]", part[1])[0] if part[1] is not None else part[0]
    return name


def listed(ranks: Iterable[int]) -> str:
    """Ranks as people write them: `3, 8-15`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _text(environ: Mapping[str, str], name: str, command: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise InvalidInput(f"{command}: {name} is not set, expected what torchrun or srun gives it")
    return value


def _number(
    environ: Mapping[str, str], name: str, command: str, least: int = 0, most: int | None = None
) -> int:
    text = _text(environ, name, command)
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least or (most is not None and number > most):
        upto = f" up to {most}" if most is not None else ""
        raise InvalidInput(f"{command}: {name} is {text!r}, expected a number from {least}{upto}")
    return number
