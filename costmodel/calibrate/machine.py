"""The device at hand: its name, its memory, and what a process holds before it trains."""

from __future__ import annotations

import os
import platform
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from ..ranks import Team

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_RESERVED_AT_MOST = 1 / 8
"""Of a GPU's memory: what is taken beyond that is another process's, not this one's context."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One device: a GPU, or one rank's share of a host. `free_bytes` is what is unused now."""

    name: str
    memory_bytes: int
    free_bytes: int
    reserve_bytes: int
    multiprocessors: int | None


def machine(team: Team) -> Machine:
    """Reads the device of this rank; the ranks of a host share its memory evenly."""
    import torch

    if team.device.type == "cuda":
        traits = torch.cuda.get_device_properties(team.device)
        free_bytes, total_bytes = torch.cuda.mem_get_info(team.device)
        taken = min(total_bytes - free_bytes, int(total_bytes * _RESERVED_AT_MOST))
        name = _plain(traits.name)
        return Machine(name, total_bytes, free_bytes, taken, traits.multi_processor_count)
    total_bytes = _host_bytes() // team.ranks_here
    free_bytes = min(_available_bytes() // team.ranks_here, total_bytes)
    taken = min(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, total_bytes // 2)
    name = f"{_plain(_processor())}-{torch.get_num_threads()}-threads"
    return Machine(name, total_bytes, free_bytes, taken, None)


def _host_bytes() -> int:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _available_bytes() -> int:
    """What can be had without swapping; the free pages where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
        found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _plain(name: str) -> str:
    """A name for files: `nvidia-h100-80gb-hbm3`."""
    name = re.sub(r"\((R|TM|C)\)|CPU|@.*", "", name, flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))
