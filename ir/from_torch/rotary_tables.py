"""Rotary tables, recognised by their values: cos and sin of position · frequency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import torch
from torch import Tensor

from ..errors import UnsupportedOp
from .draft import Wire, ancestors
from .evaluate import Evaluation, NoValue, Settings

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
        values = [_twice(part.double(), style) for part in (values[0].real, values[0].imag)]
    cos, sin = (value.double() for value in values)
    length = cos.shape[0]
    scaling = float(cos[0, 0])
    angles = _angles(wires[0], evaluation)
    row = torch.atan2(sin, cos)[1] if angles is None else _row(angles, length)
    if row.numel() == size:
        row = row[::2] if torch.equal(row[::2], row[1::2]) else row[: size // 2]
    want = torch.arange(length, dtype=torch.float64)[:, None] * _twice(row, style)
    tolerance = _STORED if angles is None else _COMPUTED
    for have, right in ((cos, want.cos() * scaling), (sin, want.sin() * scaling)):
        if have.shape != right.shape or not torch.allclose(have, right, rtol=0, atol=tolerance):
            raise UnsupportedOp(f"{where}: its tables are not cos and sin of position · frequency")
    scaling = 1.0 if isclose(scaling, 1.0, abs_tol=1e-7) else scaling
    return Table(tuple(row.tolist()), scaling, style)


def _twice(row: Tensor, style: str) -> Tensor:
    return torch.cat((row, row), -1) if style == "half" else row.repeat_interleave(2, -1)


def _rows(value: Tensor) -> Tensor:
    """[s, d] of a table that is the same for all sequences and heads."""
    value = value.reshape(*(n for n in value.shape if n != 1)) if value.dim() > 2 else value
    if value.dim() == 3 and bool((value == value[:1]).all()):
        value = value[0]
    return value


def _row(angles: Tensor, length: int) -> Tensor:
    """Angles of position 1."""
    return angles.reshape(-1, length, angles.shape[-1])[0, 1].double()


def _angles(table: Wire, evaluation: Evaluation) -> Tensor | None:
    """What forward takes the cosine of, if it does: exact where atan2 of the table is not."""
    for wire in ancestors([table]):
        if wire.producer and wire.producer.kind in ("aten.cos", "aten.polar"):
            found = evaluation(wire.producer.operands[-1].source)
            assert isinstance(found, Tensor)
            return found
    return None
