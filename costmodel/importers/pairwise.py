"""Matrices of bandwidths as CSV or columns of numbers, as Pipette's profiler writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InvalidInput
from .symmetry import MeasuredPairs, symmetrised

_NONE = {"", "-", "x", "nan", "n/a", "inf"}


def pairwise(
    *texts: str,
    unit_bytes_per_s: float = 1e6,
    flows: int = 1,
    nodes: Sequence[str] = (),
    source: str = "pairwise matrix",
) -> MeasuredPairs:
    """One or more captures of the bandwidth from each node (row) to each other (column).

    Commas, tabs or spaces separate; a first row and column of names is optional; the diagonal is
    not read. Values times `unit_bytes_per_s` are bandwidths (default MB/s), of `flows` devices of
    a node together. `nodes` gives the order of the cluster's nodes by name, if another. Raises
    InvalidInput with the line of what is not a bandwidth, is missing, or of unknown nodes.
    """
    read = [_matrix(text, source) for text in texts]
    if not read:
        raise InvalidInput(f"{source}: expected at least one matrix")
    names = read[0][0]
    captures = [in_order(one, other, names, source) for other, one in read]
    order = tuple(nodes) or names
    scaled = [in_order(one, names, order, source) * unit_bytes_per_s / flows for one in captures]
    return symmetrised(scaled, order, source)


def in_order(
    matrix: NDArray[np.float64], names: Sequence[str], order: Sequence[str], source: str
) -> NDArray[np.float64]:
    """Rows and columns of `names` as `order` has them; InvalidInput where the two differ."""
    for name in order:
        if name not in names:
            raise InvalidInput(f"{source}: no node {name!r}, it has {', '.join(names[:8])}")
    if len(order) != len(names):
        extra = next(name for name in names if name not in order)
        raise InvalidInput(f"{source}: node {extra!r} is not among the {len(order)} expected")
    index = [list(names).index(name) for name in order]
    return matrix[np.ix_(index, index)]


def _matrix(text: str, source: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InvalidInput(f"{source}: is empty, expected a square matrix of bandwidths")
    rows = [(i, _cells(line)) for i, line in lines]
    names: list[str] = []
    first = rows[0][1]
    if _number(first[0]) is None or all(_number(cell) is None for cell in first[1:]):
        rows = rows[1:]
        named = len(rows) > 0 and _number(rows[0][1][0]) is None
        # Without the cell above the names of the rows.
        names = first[1:] if named or len(first) == len(rows) + 1 else first
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidInput(f"{source}, line {lines[0][0]}: node {twice!r} is named twice")
    size = len(names) or len(rows)
    matrix = np.zeros((size, size))
    if len(rows) != size or size < 2:
        raise InvalidInput(
            f"{source}: {len(rows)} rows of {size} nodes, expected a square matrix of 2 or more"
        )
    for at, (line, cells) in enumerate(rows):
        if names and len(cells) == size + 1:
            if cells[0] != names[at]:
                raise InvalidInput(
                    f"{source}, line {line}: row of {cells[0]!r}, expected {names[at]!r} as in the "
                    "header"
                )
            cells = cells[1:]
        if len(cells) != size:
            raise InvalidInput(f"{source}, line {line}: {len(cells)} values, expected {size}")
        for to, cell in enumerate(cells):
            if at != to:
                matrix[at, to] = _bandwidth(cell, f"{source}, line {line}", at, to)
    return tuple(names or map(str, range(size))), matrix


def _cells(line: str) -> list[str]:
    parts = line.split(",") if "," in line else re.split(r"\t" if "\t" in line else r"\s+", line)
    cells = [part.strip().strip('"') for part in parts]
    return cells[1:] if "," not in line and "\t" not in line and cells[0] == "" else cells


def _number(cell: str) -> float | None:
    if cell.lower() in _NONE:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _bandwidth(cell: str, where: str, at: int, to: int) -> float:
    value = _number(cell)
    if value is None or not math.isfinite(value) or value <= 0:
        shown = "no bandwidth" if value is not None and math.isnan(value) else f"{cell!r}"
        raise InvalidInput(
            f"{where}: {shown} from node {at} to node {to}, expected a number above 0"
        )
    return value
