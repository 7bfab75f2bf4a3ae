"""Processes that measure together, started by torchrun or srun.

    launch  Launch: who this process is, by the launcher's environment
    join    how the ranks find each other; who did not come
    watch   beats of every rank; says which one died
    team    Team: all start at once, rank 0 decides

torch is imported only when a team is made.
"""

from .launch import Launch, launched, listed
from .team import DeviceKind, Team, alone, team_of

__all__ = ["DeviceKind", "Launch", "Team", "alone", "launched", "listed", "team_of"]
