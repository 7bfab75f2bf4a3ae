"""Output of nccl-tests (rccl-tests prints the same): curves of collectives by size.

The columns are found by the header, since versions differ. `size` is the full tensor of an
all-gather or reduce-scatter, but each rank's own buffer of an all-to-all (nccl-tests,
doc/PERFORMANCE.md and alltoall.cu). Out-of-place and in-place times are averaged: their
difference is noise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from ...ir.errors import InvalidInput
from ..cluster import Cluster
from ..curves import CollectiveKind, Curve

_COLLECTIVES: dict[str, CollectiveKind | None] = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "sendrecv": "send",
    "reduce": None,
    "gather": None,
    "scatter": None,
    "hypercube": None,
    "alltoallv": None,
}
"""Names of the test programs; None where training has no use for it."""
_PROGRAM = re.compile(rf"\b({'|'.join(sorted(_COLLECTIVES, key=len, reverse=True))})_perf\b")
_RANK = re.compile(r"#\s+Rank\s+(\d+)\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+")
_PREFIX = re.compile(r"^(\[[^\]]*\d+,\d+\]<std\w+>:|\d+:)\s?")  # mpirun --tag-output, srun -l
_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class ImportedCurves:
    """Curves for `Cluster.with_curves`, and what to know of them.

    `noise_fraction` is the median difference between repeated measurements of one size.
    """

    curves: tuple[Curve, ...]
    noise_fraction: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """One table of the output: its ranks' hosts, and times by size in the order of the lines."""

    program: str | None = None
    hosts: tuple[str, ...] = ()
    line: int = 0
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[float, float, tuple[float, ...]], ...] = field(default=())
    """Bytes as printed, bus over algorithm bandwidth (0: unknown), seconds measured."""


def nccl_tests(
    text: str,
    cluster: Cluster,
    collective: CollectiveKind | None = None,
    source: str = "nccl-tests",
) -> ImportedCurves:
    """The curves of one or more outputs, one after the other, on the levels of a cluster.

    `collective` names it where the output does not (before version 2.15 only the command line
    does). Raises InvalidInput for a text without results, a collective that cannot be told or is
    not used in training, results that were wrong, or ranks that no group shape describes.
    """
    curves: list[Curve] = []
    spreads: list[float] = []
    for run in _runs(text, source):
        kind = collective or _kind(run, source)
        shape = group_shape(cluster, run.hosts, f"{source}, line {run.line}")
        size = len(run.hosts)
        scale = size if kind == "all_to_all" else 1
        by_size: dict[float, list[float]] = {}
        for printed, _, seconds in run.rows:
            by_size.setdefault(printed * scale, []).extend(seconds)
        for times in by_size.values():
            spreads += [(max(times) - min(times)) / median(times)] if len(times) > 1 else []
        curves.append(
            Curve(
                collective=kind,
                shape=(*(1 for _ in shape[:-1]), 2) if kind == "send" else shape,
                bytes=tuple(sorted(by_size)),
                seconds=tuple(
                    sum(by_size[bytes]) / len(by_size[bytes]) for bytes in sorted(by_size)
                ),
                source=source,
            )
        )
    if not curves:
        raise InvalidInput(
            f"{source}: holds no results, expected the table that nccl-tests prints (# size count "
            "type … time algbw busbw)"
        )
    noise = median(spreads) if spreads else 0.0
    note = f"repeated measurements of one size differ by {noise:.1%} in the median"
    return ImportedCurves(tuple(curves), noise, (note,) if spreads else ())


def group_shape(cluster: Cluster, hosts: Sequence[str], where: str) -> tuple[int, ...]:
    """The shape (see `Curve`) of ranks that fill hosts from their first device on.

    `hosts` is the host of each rank. Raises InvalidInput where hosts have unequally many, or the
    levels of the cluster cannot hold them evenly.
    """
    counts = Counter(hosts)
    per_host = counts[hosts[0]]
    uneven = next((host for host in counts if counts[host] != per_host), None)
    if uneven is not None:
        raise InvalidInput(
            f"{where}: {per_host} ranks on {hosts[0]} and {counts[uneven]} on {uneven}, expected "
            "equally many on every host"
        )
    shape: list[int] = []
    inside = 1
    for level in cluster.levels:
        within, nodes = level.span_devices, 1
        if level.whole_island:
            within = cluster.islands[0].nodes * cluster.devices_per_node
        if within > cluster.devices_per_node:
            within, nodes = cluster.devices_per_node, within // cluster.devices_per_node
        members = min(per_host, within) * min(len(counts), nodes)
        if members % inside:
            break
        shape.append(members // inside)
        inside = members
        if inside == len(hosts):
            break
    if inside != len(hosts):
        raise InvalidInput(
            f"{where}: {len(counts)} hosts x {per_host} ranks do not lie evenly on cluster "
            f"{cluster.name} of {cluster.nodes} nodes x {cluster.devices_per_node}"
        )
    return tuple(shape)


def _runs(text: str, source: str) -> list[_Run]:
    runs: list[_Run] = []
    run = _Run()
    for number, raw in enumerate(text.splitlines(), 1):
        line = _PREFIX.sub("", raw)
        program = _PROGRAM.search(line)
        rank = _RANK.search(line)
        # The libraries' warnings name the program too, in the middle of its table.
        if run.rows and (rank or (program and program[1] != run.program)):
            runs.append(run)
            run = _Run()
        if program:
            run = replace(run, program=program[1])
        elif rank:
            if int(rank[1]) != len(run.hosts):
                raise InvalidInput(
                    f"{source}, line {number}: rank {rank[1]} after {len(run.hosts)} ranks, "
                    "expected them in order (without MPI support every process is a run of its own)"
                )
            if rank[2] not in (None, "0"):
                raise InvalidInput(
                    f"{source}, line {number}: rank {rank[1]} is of group {rank[2]}, expected one "
                    "group of all ranks (NCCL_TESTS_SPLIT runs several at once)"
                )
            run = replace(run, hosts=(*run.hosts, rank[3]), line=run.line or number)
        elif _is_header(line):
            run = replace(run, columns=tuple(line.replace("#", " ").split()))
        elif re.match(r"\s*\d[\d.]*[KMGkmg]?\s+\d+\s+\w+\s", line) and run.columns:
            run = replace(run, rows=(*run.rows, *_row(line, run, f"{source}, line {number}")))
    return [one for one in (*runs, run) if one.rows]


def _bytes(word: str) -> float:
    """`1048576` or `1M`."""
    unit = _UNITS.get(word[-1].lower())
    return float(word) if unit is None else float(word[:-1]) * unit


def _is_header(line: str) -> bool:
    words = line.replace("#", " ").split()
    return words[:3] == ["size", "count", "type"] and "time" in words


def _row(line: str, run: _Run, where: str) -> list[tuple[float, float, tuple[float, ...]]]:
    """Bytes, bus over algorithm bandwidth, seconds; nothing for an empty tensor."""
    words = line.split()
    if not run.hosts:
        raise InvalidInput(f"{where}: results without the list of ranks (# Rank 0 … on HOST …)")
    # Columns of text may be blank, so count from the end.
    at = [i - len(run.columns) for i, name in enumerate(run.columns) if name == "time"]
    wrong = [i - len(run.columns) for i, name in enumerate(run.columns) if name == "wrong"]
    try:
        bytes = _bytes(words[0])
        timed = [i for i in at if words[i] != "N/A"]
        seconds = tuple(float(words[i]) * 1e-6 for i in timed)
        algorithm, bus = float(words[at[0] + 1]), float(words[at[0] + 2])
    except (ValueError, IndexError):
        raise InvalidInput(
            f"{where}: expected a number in each column of {' '.join(run.columns)}"
        ) from None
    for i in wrong:
        if words[i] not in ("0", "N/A"):
            raise InvalidInput(f"{where}: {words[i]} wrong results, expected 0: the run is broken")
    if bytes == 0:
        return []
    if not all(0 < second < float("inf") for second in seconds) or not seconds:
        shown = " and ".join(words[i] for i in timed) or "none"
        raise InvalidInput(f"{where}: a time of {shown} us, expected more than 0")
    return [(bytes, bus / algorithm if algorithm else 0.0, seconds)]


def _kind(run: _Run, source: str) -> CollectiveKind:
    """By the program's name, else by the ratio of bus to algorithm bandwidth."""
    where = f"{source}, line {run.line}"
    if run.program is not None:
        kind = _COLLECTIVES[run.program]
        if kind is None:
            used = ", ".join(name for name, kind in _COLLECTIVES.items() if kind)
            raise InvalidInput(f"{where}: {run.program}_perf, expected one of {used}")
        return kind
    size = len(run.hosts)
    ratio = median(ratio for _, ratio, _ in run.rows[-3:])
    # Only an all-reduce moves more over the bus than its size, from three ranks on.
    if size > 2 and abs(ratio - 2 * (size - 1) / size) < 0.05:
        return "all_reduce"
    raise InvalidInput(
        f"{where}: the output does not name its collective: expected a line with the program "
        "(all_gather_perf …), or pass it as `collective`"
    )
