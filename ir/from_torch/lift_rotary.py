"""Rotary embeddings: x·cos + rotate(x)·sin becomes `rotary`, its tables `rotary_table`.

The rotation is matched, the tables are evaluated: whatever computes cos(position · frequency) is
one, however the frequencies were scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, prod

import torch
from torch import Tensor

from ..errors import UnsupportedOp
from .draft import Draft, Op, Wire, ancestors, uncast
from .evaluate import NoValue, Settings


@dataclass(frozen=True, slots=True)
class _Table:
    """cos and sin of position · inv_freq, times scaling."""

    inv_freq: tuple[float, ...]
    scaling: float
    style: str


def lift_rotary(draft: Draft, make: Settings) -> None:
    """Replaces every rotation of activations by tables that do not depend on them."""
    tables: dict[_Table, tuple[Wire, Wire]] = {}
    for op in draft.each("add"):
        if found := _rotation(op):
            x, cos, sin, style = found
            table = _table(cos, sin, x, style, make, op.module)
            _replace(draft, op, x, table, tables)
    draft.sweep()


def _rotation(op: Op) -> tuple[Wire, Wire, Wire, str] | None:
    """(x, cos, sin, style) of add(mul(x, cos), mul(rotate(x), sin))."""
    for first, second in (op.operands, op.operands[::-1]):
        straight, turned = uncast(first).made_by("mul"), uncast(second).made_by("mul")
        if straight is None or turned is None:
            return None
        x, cos = _carried_first(straight)
        rotated, sin = _carried_first(turned)
        if x is None or rotated is None or cos is None or sin is None:
            return None
        if style := _rotate_style(uncast(rotated), uncast(x)):
            return uncast(x), cos, sin, style
    return None


def _carried_first(op: Op) -> tuple[Wire | None, Wire | None]:
    a, b = op.operands
    if a.carried == b.carried:
        return None, None
    return (a, b) if a.carried else (b, a)


def _rotate_style(rotated: Wire, x: Wire) -> str:
    """`half` for concat(-second half, first half); `interleaved` for pairs; else empty."""
    concat = rotated.made_by("concat")
    if concat and len(concat.operands) == 2 and concat.attributes["dim"] == x.rank - 1:
        negative = concat.operands[0].made_by("neg")
        if negative and _is_half(negative.operands[0], x, 1) and _is_half(concat.operands[1], x, 0):
            return "half"
    return ""


def _is_half(wire: Wire, x: Wire, index: int) -> bool:
    """Whether a wire is the first (0) or second (1) half of the last dim of x."""
    half = prod(x.dims[-1]) // 2  # type: ignore[arg-type]
    if op := wire.made_by("slice"):
        start, stop = op.attributes["start"], op.attributes["stop"]
        return (
            uncast(op.operands[0]) is x
            and op.attributes["dim"] == x.rank - 1
            and (start, stop) == (index * half, (index + 1) * half)
        )
    if op := wire.made_by("chunk"):
        return (
            uncast(op.operands[0]) is x
            and op.attributes == {"dim": x.rank - 1, "count": 2}
            and op.results[index] is wire
        )
    return False


def _table(cos: Wire, sin: Wire, x: Wire, style: str, make: Settings, module: str) -> _Table:
    """Frequencies and scaling of two tables. Raises UnsupportedOp where they are no such tables."""
    where = f"rotary embedding at {module or 'the top level'}"
    try:
        one, other = make(s=11, seed=0), make(s=11, seed=1)
        values = [_rows(one(wire.source)) for wire in (cos, sin)]
        again = [_rows(other(wire.source)) for wire in (cos, sin)]
        angles = _angles(cos, one)
    except NoValue:
        raise UnsupportedOp(f"{where}: its tables depend on parameters") from None
    if not all(torch.equal(v, w) for v, w in zip(values, again, strict=True)):
        raise UnsupportedOp(f"{where}: positions that are given as inputs; expected 0 … s-1")
    table, shifted = values
    length = table.shape[0]
    scaling = float(table[0, 0])
    size = prod(x.dims[-1])  # type: ignore[arg-type]
    if angles is None:
        angles = torch.atan2(shifted, table)
    frequencies = angles.reshape(-1, length, angles.shape[-1])[0, 1][: size // 2]
    inverse = tuple(frequencies.double().tolist())
    want = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double().repeat(2)
    exact = [want.cos() * scaling, want.sin() * scaling]
    if not all(
        have.shape == right.shape and torch.allclose(have.double(), right, rtol=0, atol=1e-9)
        for have, right in zip(values, exact, strict=True)
    ):
        raise UnsupportedOp(f"{where}: its tables are not cos and sin of position · frequency")
    return _Table(inverse, 1.0 if isclose(scaling, 1.0, abs_tol=1e-15) else scaling, style)


def _rows(value: Tensor) -> Tensor:
    """[s, d] of a table that is the same for all sequences and heads."""
    value = value.reshape(*(n for n in value.shape if n != 1)) if value.dim() > 2 else value
    if value.dim() == 3 and bool((value == value[:1]).all()):
        value = value[0]
    return value


def _angles(cos: Wire, evaluation: object) -> Tensor | None:
    """The operand of the cosine, if there is one: exact where atan2 of the table is not."""
    assert callable(evaluation)
    for wire in ancestors([cos]):
        if wire.producer and wire.producer.kind == "aten.cos":
            found = evaluation(wire.producer.operands[0].source)
            assert isinstance(found, Tensor)
            return found
    return None


def _replace(
    draft: Draft, op: Op, x: Wire, table: _Table, tables: dict[_Table, tuple[Wire, Wire]]
) -> None:
    sequence = 2 if op.operands[0].rank == 4 and _sequence_dim(op, x) == 2 else 1
    if x.rank != 4:
        raise UnsupportedOp(
            f"rotary embedding at {op.module or 'the top level'}: an operand of rank {x.rank}; "
            "expected [batch, heads, sequence, head size]"
        )
    s = x.dims[sequence]
    if table not in tables:
        tables[table] = _add_tables(draft, table, s, x.dims[-1])
    swap = [0, 2, 1, 3]
    operand = x
    if sequence == 1:
        dims = tuple(x.dims[d] for d in swap)
        operand = draft.add(
            "permute", [x], dims, attributes={"order": swap}, module=op.module, before=op
        ).result
    result = draft.add(
        "rotary", [operand, *tables[table]], operand.dims, dtype=x.dtype,
        attributes={"style": table.style}, module=op.module, before=op,
    ).result  # fmt: skip
    if sequence == 1:
        result = draft.add(
            "permute", [result], x.dims, attributes={"order": swap}, module=op.module, before=op
        ).result
    if op.result.dtype != result.dtype:
        back = [r for r in draft.readers(op.result) if r.kind == "cast" and r.result.dtype == x.dtype]
        for reader in back:
            draft.redirect(reader.result, result)
        if len(back) < len(draft.readers(op.result)):
            result = draft.add(
                "cast", [result], result.dims, dtype=op.result.dtype,
                attributes={"to": op.result.dtype}, module=op.module, before=op,
            ).result  # fmt: skip
    draft.redirect(op.result, result)


def _sequence_dim(op: Op, x: Wire) -> int:
    """The dim of x along which cos varies: the one that cos has besides the last."""
    cos = next(w for operand in op.operands for w in _statics(operand) if w.rank >= 2)
    present = [i - cos.rank for i, dim in enumerate(cos.dims[:-1]) if dim and dim != ("b",)]
    if not present:
        return 2
    return x.rank + present[-1]


def _statics(wire: Wire) -> list[Wire]:
    op = uncast(wire).made_by("mul")
    return [w for w in op.operands if not w.carried] if op else []


def _add_tables(draft: Draft, table: _Table, s: tuple[int | str, ...], d: tuple[int | str, ...]) -> tuple[Wire, Wire]:
    first = draft.ops[0] if draft.ops else None
    positions = draft.add("positions", [], (s,), dtype="int64", before=first)
    dims = ((), s, d)
    made = draft.add(
        "rotary_table", [positions.result], [dims, dims], count=2, dtype="model", before=first,
        attributes={"inv_freq": list(table.inv_freq), "scaling": table.scaling, "style": table.style},
    )  # fmt: skip
    made.results[0].name, made.results[1].name = "cos", "sin"
    return made.results[0], made.results[1]
