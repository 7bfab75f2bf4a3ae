"""The engine: moves the bytes of a plan. It knows records and boxes, and nothing of formats."""

from .directory import DiskFull, Place, place
from .ranks import LostRank, Ranks, from_environment
from .run import Limits, Moved, execute

__all__ = [
    "DiskFull",
    "Limits",
    "LostRank",
    "Moved",
    "Place",
    "Ranks",
    "execute",
    "from_environment",
    "place",
]
