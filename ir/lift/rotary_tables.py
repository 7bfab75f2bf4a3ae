"""Rotary tables, recognised by their values: cos and sin of position · frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import numpy as np

from ..errors import UnsupportedOp
from .draft import Wire, ancestors
from .evaluate import Array, Evaluation, NoValue, Settings, equal

_COMPUTED, _STORED = 1e-9, 1e-6
"""Tolerances for tables that forward computes (here in float64) and for stored float32 ones."""


@dataclass(frozen=True, slots=True)
class Table:
    """cos and sin of position · inv_freq, times scaling, laid out as the style says."""

    inv_freq: tuple[float, ...]
    scaling: float
    style: str


def table_of(wires: Sequence[Wire], style: str, size: int, make: Settings, where: str) -> Table:
    """The table that wires hold: (cos, sin), or one of complex numbers; `size` is the head size.

    Raises UnsupportedOp where they are no such tables, or positions are no 0 … s-1.
    """
    found = []
    try:
        for s, seed in ((11, 0), (23, 1)):  # the same whatever the length and the inputs
            found.append(_fitted(wires, style, size, make(s=s, seed=seed), where))
    except NoValue:
        raise UnsupportedOp(f"{where}: its tables depend on parameters") from None
    if found[0] != found[1]:
        raise UnsupportedOp(
            f"{where}: its tables depend on the inputs or on the sequence length; expected "
            "positions 0 … s-1 and fixed frequencies"
        )
    return found[0]


def _fitted(
    wires: Sequence[Wire], style: str, size: int, evaluation: Evaluation, where: str
) -> Table:
    values = [_rows(evaluation(wire.source)) for wire in wires]
    if len(values) == 1:  # complex: cos + i·sin, one number per pair
        values = [_twice(part, style) for part in (values[0].real, values[0].imag)]
    cos, sin = (value.astype(float) for value in values)
    if 2 * cos.shape[-1] == size:  # one number per pair
        cos, sin = _twice(cos, style), _twice(sin, style)
    length = cos.shape[0]
    scaling = float(cos[0, 0])
    angles = _angles(wires[0], evaluation)
    row = np.arctan2(sin, cos)[1] if angles is None else _row(angles, length)
    if row.size == size:
        row = row[::2] if equal(row[::2], row[1::2]) else row[: size // 2]
    want = np.arange(length, dtype=float)[:, None] * _twice(row, style)
    tolerance = _STORED if angles is None else _COMPUTED
    for have, right in ((cos, np.cos(want) * scaling), (sin, np.sin(want) * scaling)):
        if have.shape != right.shape or not np.allclose(have, right, rtol=0, atol=tolerance):
            raise UnsupportedOp(f"{where}: its tables are not cos and sin of position · frequency")
    scaling = 1.0 if isclose(scaling, 1.0, abs_tol=1e-7) else scaling
    return Table(tuple(row.tolist()), scaling, style)


def _twice(row: Array, style: str) -> Array:
    return np.concatenate((row, row), -1) if style == "half" else np.repeat(row, 2, -1)


def _rows(value: Array) -> Array:
    """[s, d] of a table that is the same for all sequences and heads."""
    value = value.reshape([n for n in value.shape if n != 1]) if value.ndim > 2 else value
    if value.ndim == 3 and bool((value == value[:1]).all()):
        value = value[0]
    return value


def _row(angles: Array, length: int) -> Array:
    """Angles of position 1."""
    return np.asarray(angles.reshape(-1, length, angles.shape[-1])[0, 1].astype(float))


def _angles(table: Wire, evaluation: Evaluation) -> Array | None:
    """What forward takes the cosine of, if it does: exact where atan2 of the table is not."""
    for wire in ancestors([table]):
        if wire.producer and wire.producer.kind in ("aten.cos", "aten.polar", "jax.cos"):
            return evaluation(wire.producer.operands[-1].source)
    return None
