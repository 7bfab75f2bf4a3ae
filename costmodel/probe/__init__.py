"""What links between ranks really do, measured: `shardwright probe`.

    rounds      rounds of disjoint pairs; nodes; the natural groups
    schedule    what to measure in which order, and what to leave out when time is short
    exchange    one measurement on this rank
    run         the measurements of all ranks within a time budget
    noise       medians, noise floor, slow ends and links
    fit         latency and bandwidth of a link
    findings    curves, levels, what is slow
    cluster_of  the Cluster of it
    table       what a person reads
    words       figures with their units
    command     the body of the command

All but exchange and command are plain functions of plain data. torch is imported only when
something is measured.
"""

from .command import PROBE_S, probed, run_probe

__all__ = ["PROBE_S", "probed", "run_probe"]
