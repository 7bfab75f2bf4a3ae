"""Output of mpiGraph (Lawrence Livermore): bandwidth between all pairs of tasks, one per node.

Each task's sends and receives of the same transfers are timed apart and printed as two tables in
MiB/s (mpiGraph.c divides by 1024²): `Send` rows are from the row's task, `Recv` rows to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InvalidInput
from .pairwise import in_order
from .symmetry import MeasuredPairs, symmetrised

_UNIT_BYTES_PER_S = 1024.0**2
_TABLE = re.compile(r"(Send|Recv)\t(.*:\d+.*)")
_ROW = re.compile(r"(.*):(\d+) (to|from)\t(.*)")


def mpigraph(
    *texts: str, flows: int = 1, nodes: Sequence[str] = (), source: str = "mpiGraph"
) -> MeasuredPairs:
    """One or more outputs; `flows` devices of a node share what a task measured.

    `nodes` gives the order of the cluster's nodes by host name, if another than that of the tasks.
    Raises InvalidInput for a text without both tables, with several tasks on a host (links inside
    a node are none of its business), or with a row or a number missing.
    """
    captures = []
    order = tuple(nodes)
    for text in texts:
        hosts, matrix = _capture(text, source)
        order = order or hosts
        captures.append(in_order(matrix, hosts, order, source) * _UNIT_BYTES_PER_S / flows)
    return symmetrised(captures, order, source)


def _capture(text: str, source: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    tables: dict[str, NDArray[np.float64]] = {}
    hosts: tuple[str, ...] = ()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if header := _TABLE.fullmatch(line.rstrip()):
            found = [cell.rpartition(":")[0] for cell in header[2].split("\t") if cell]
            hosts = tuple(found)
            if len(set(hosts)) != len(hosts):
                twice = next(host for host in hosts if hosts.count(host) > 1)
                raise InvalidInput(
                    f"{source}, line {number}: several tasks on {twice}, expected one per node "
                    "(srun -N nodes -n nodes)"
                )
            tables[header[1]] = _table(lines, number, hosts, source)
    if tables.keys() != {"Send", "Recv"} or len(hosts) < 2:
        raise InvalidInput(
            f"{source}: found {' and '.join(tables) or 'no'} table, expected the Send and Recv "
            "tables that mpiGraph prints, of 2 or more hosts"
        )
    # Both ends timed the same transfers: one measurement, not two.
    return hosts, (tables["Send"] + tables["Recv"].T) / 2


def _table(
    lines: Sequence[str], start: int, hosts: Sequence[str], source: str
) -> NDArray[np.float64]:
    matrix = np.zeros((len(hosts), len(hosts)))
    for at, host in enumerate(hosts):
        number = start + 1 + at
        row = _ROW.fullmatch(lines[number - 1].rstrip()) if number <= len(lines) else None
        cells = row[4].split("\t") if row else []
        if row is None or row[1] != host or len(cells) != len(hosts):
            raise InvalidInput(
                f"{source}, line {number}: expected the row of {host} with {len(hosts)} values"
            )
        for to, cell in enumerate(cells):
            try:
                value = float(cell)
            except ValueError:
                value = -1.0
            if to != at and not 0 < value < np.inf:
                raise InvalidInput(
                    f"{source}, line {number}: {cell!r} between {host} and {hosts[to]}, expected "
                    "a number above 0"
                )
            matrix[at, to] = value
    return matrix
