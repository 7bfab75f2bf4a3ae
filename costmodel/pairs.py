"""Measured links between single pairs of devices, nodes or islands, as they stand in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator, model_serializer, model_validator

from .levels import FROZEN
from .yaml_files import Misfit

Index = Annotated[int, Field(ge=0)]
_DIGITS = 4
"""Significant digits kept of a matrix: noise is in the second (the project's captures)."""


class Pair(BaseModel):
    """What is known of the link between two devices (ranks), nodes or islands (by name).

    `bandwidth_bytes_per_s` is what one device at one end reaches to one at the other with large
    messages, nothing else under way; `bandwidth_fraction` says instead how much is left of what
    the levels promise. Meant from the first to the second; the other direction is the same unless
    it has an entry of its own.
    """

    model_config = FROZEN

    devices: tuple[Index, Index] | None = None
    nodes: tuple[Index, Index] | None = None
    islands: tuple[str, str] | None = None
    bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    bandwidth_fraction: float | None = Field(default=None, gt=0, le=1)
    latency_s: float | None = Field(default=None, ge=0)

    @property
    def kind(self) -> str:
        """`devices`, `nodes` or `islands`: the field that names the ends."""
        return next(k for k in ("devices", "nodes", "islands") if getattr(self, k) is not None)

    @property
    def ends(self) -> tuple[int, int] | tuple[str, str]:
        """The two ends, in the order given."""
        ends: tuple[int, int] | tuple[str, str] = getattr(self, self.kind)
        return ends

    @model_validator(mode="after")
    def _says_one_thing(self) -> Pair:
        given = [k for k in ("devices", "nodes", "islands") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of devices, nodes, islands, got {given or 'none'}")
        first, second = self.ends
        if first == second:
            raise Misfit(f"is {[first, second]}, expected two different ends", given[0])
        if self.bandwidth_bytes_per_s is not None and self.bandwidth_fraction is not None:
            raise Misfit("is given beside bandwidth_bytes_per_s: keep one", "bandwidth_fraction")
        if self.bandwidth_bytes_per_s is self.bandwidth_fraction is self.latency_s is None:
            raise Misfit(
                "is missing: expected it, bandwidth_fraction or latency_s", "bandwidth_bytes_per_s"
            )
        return self


class PairMatrix(BaseModel):
    """Bandwidth between all pairs of a run of nodes, as `Pair.bandwidth_bytes_per_s`.

    `rows[i][j]`, times `unit_bytes_per_s`, is from node `first_node + i` to `first_node + j`; where
    a row stops at the diagonal, the other direction is the same. `noise_floor_fraction` is the
    difference between two links that the measurement cannot tell from chance. Files write a row as
    `"195 -  192"`, with - for the node itself.
    """

    model_config = FROZEN

    unit_bytes_per_s: float = Field(default=1e6, gt=0)
    first_node: Index = 0
    noise_floor_fraction: float = Field(default=0.0, ge=0, lt=1)
    source: str = ""
    rows: tuple[tuple[int, ...], ...] = Field(min_length=2)

    @property
    def size(self) -> int:
        """Number of nodes."""
        return len(self.rows)

    @property
    def is_lower(self) -> bool:
        """Whether rows stop at the diagonal: every link is the same both ways."""
        return len(self.rows[0]) == 1

    @property
    def bandwidth_bytes_per_s(self) -> NDArray[np.float64]:
        """(size, size), from row to column; infinite on the diagonal."""
        full = np.zeros((self.size, self.size))
        for i, row in enumerate(self.rows):
            full[i, : len(row)] = row
            if self.is_lower:
                full[:i, i] = row[:i]
        full *= self.unit_bytes_per_s
        np.fill_diagonal(full, np.inf)
        return full

    @staticmethod
    def of(
        bandwidth_bytes_per_s: NDArray[np.float64],
        noise_floor_fraction: float = 0.0,
        first_node: int = 0,
        source: str = "",
    ) -> PairMatrix:
        """From a square array (the diagonal is not read), rounded to four significant digits.

        Raises ValueError (InvalidInput through `Cluster.with_pairs`) where a link is missing.
        """
        size = len(bandwidth_bytes_per_s)
        largest = float(np.max(bandwidth_bytes_per_s[~np.eye(size, dtype=bool)]))
        unit = 10.0 ** (math.floor(math.log10(largest)) + 1 - _DIGITS)
        counts = np.maximum(np.rint(bandwidth_bytes_per_s / unit), 1)
        np.fill_diagonal(counts, 0)
        counts = counts.astype(np.int64)
        lower = bool((counts == counts.T).all())
        return PairMatrix(
            unit_bytes_per_s=unit,
            first_node=first_node,
            noise_floor_fraction=noise_floor_fraction,
            source=source,
            rows=tuple(
                tuple(row[: i + 1] if lower else row) for i, row in enumerate(counts.tolist())
            ),
        )

    @field_validator("rows", mode="before")
    @classmethod
    def _read_rows(cls, rows: Any) -> Any:
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            return rows
        return [_numbers(row, i) if isinstance(row, str) else row for i, row in enumerate(rows)]

    @model_validator(mode="after")
    def _is_square(self) -> PairMatrix:
        for i, row in enumerate(self.rows):
            expected = i + 1 if self.is_lower else self.size
            if len(row) != expected:
                shape = "up to its own node" if self.is_lower else f"for {self.size} nodes"
                raise Misfit(f"has {len(row)} entries, expected {expected} ({shape})", "rows", i)
            for j, value in enumerate(row):
                if (value > 0) == (i == j):
                    raise Misfit(_entry_problem(value, self.first_node + i, j - i), "rows", i)
        return self

    @model_serializer(mode="wrap")
    def _compact(self, handler: Any) -> Any:
        data = handler(self)
        if "rows" in data:
            data["rows"] = [" ".join(str(v) if v else "-" for v in row) for row in data["rows"]]
        return data


def _numbers(row: str, i: int) -> list[int]:
    values = []
    for word in row.split():
        if word != "-" and not (word.isascii() and word.isdigit()):
            raise Misfit(f"holds {word!r}, expected whole numbers above 0, or -", i)
        values.append(0 if word == "-" else int(word))
    return values


def _entry_problem(value: int, node: int, distance: int) -> str:
    if distance == 0:
        return f"has {value} from node {node} to itself, expected -"
    if value == 0:
        return f"has no bandwidth from node {node} to node {node + distance}, expected a number"
    return f"has {value} from node {node} to node {node + distance}, expected a number above 0"
