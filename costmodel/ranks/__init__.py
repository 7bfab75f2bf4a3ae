"""Processes that measure together, started by torchrun or srun.

    launch  Launch: who this process is, by the launcher's environment
    join    how the ranks find each other; who did not come
    watch   beats of every rank; says which one died
    team    Team: all start at once, rank 0 decides
    output  progress on rank 0; files written whole or not at all

torch is imported only when a team is made.
"""

from .launch import Launch, launched, listed
from .output import Report, check_writable, progress, write_whole
from .team import DeviceKind, Team, alone, team_of

__all__ = [
    "DeviceKind",
    "Launch",
    "Report",
    "Team",
    "alone",
    "check_writable",
    "launched",
    "listed",
    "progress",
    "team_of",
    "write_whole",
]
