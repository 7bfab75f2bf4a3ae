"""Rotary embeddings: x·cos + rotate(x)·sin becomes `rotary`, its tables `rotary_table`.

The rotation is matched, in real and in complex numbers; the tables are evaluated: whatever computes
cos(position · frequency) is one, however the frequencies were scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UnsupportedOp
from ..rule import Size
from .dims import elements
from .draft import Draft, Op, Wire, bare, uncast
from .evaluate import Settings
from .patterns import match, matches
from .rotary_tables import Table, table_of


@dataclass(frozen=True, slots=True)
class _Rotation:
    """x and what rotates it: (cos, sin), or one table of complex numbers."""

    x: Wire
    tables: tuple[Wire, ...]
    style: str


def lift_rotary(draft: Draft, make: Settings) -> None:
    """Replaces every rotation of activations by tables that do not depend on them.

    Raises UnsupportedOp for a rotation by anything but position · frequency.
    """
    made: dict[Table, tuple[Wire, Wire]] = {}
    for op in draft.each(("add", "aten.view_as_real", "concat", "reshape")):
        found = _FORMS[op.kind](op)
        if found is None:
            continue
        where = f"rotary embedding at {op.module or 'the top level'}"
        if found.x.rank != 4:
            raise UnsupportedOp(
                f"{where}: an operand of rank {found.x.rank}; expected [batch, heads, sequence, "
                "head size]"
            )
        table = table_of(found.tables, found.style, elements(found.x.dims[-1]), make, where)
        _replace(draft, op, found, table, made)
    draft.sweep()


def _in_parts(op: Op) -> _Rotation | None:
    """concat(x1·cos - x2·sin, x2·cos + x1·sin) of the halves of x."""
    if len(op.operands) != 2 or op.attributes["dim"] != op.result.rank - 1:
        return None
    found = _turned_pair(*op.operands)
    if found is None or found[0].rank != op.result.rank:
        return None
    first, second, tables = found
    if (x := _whole(first)) is None or not (_is_half(first, x, 0) and _is_half(second, x, 1)):
        return None
    return _Rotation(x, tables, "half")


def _in_pairs(op: Op) -> _Rotation | None:
    """The same of every second entry of x, laid beside each other again."""
    stacked = op.operands[0].made_by("concat")
    if stacked is None or stacked.result.dims[-1:] != ((2,),) or len(stacked.operands) != 2:
        return None
    apart = [uncast(w).made_by("reshape") for w in stacked.operands]
    if apart[0] is None or apart[1] is None:
        return None
    found = _turned_pair(apart[0].operands[0], apart[1].operands[0])
    if found is None:
        return None
    first, second, tables = found
    x = _whole(first)
    if x is None or x.dims != op.result.dims:
        return None
    if not (_is_every_second(first, x, 0) and _is_every_second(second, x, 1)):
        return None
    return _Rotation(x, tables, "interleaved")


def _turned_pair(a: Wire, b: Wire) -> tuple[Wire, Wire, tuple[Wire, Wire]] | None:
    """(x1, x2, (cos, sin)) of a = x1·cos - x2·sin and b = x2·cos + x1·sin."""
    minus = match("sub(mul(x, c), mul(y, s))", a)
    if minus is None or not minus.wires["x"].carried:
        return None
    x, y, c, s = (minus.wires[name] for name in "xycs")
    for plus in matches("add(mul(y, c), mul(x, s))", b):
        same = [
            uncast(plus.wires[name]) is uncast(wire)
            for name, wire in zip("xycs", (x, y, c, s), strict=True)
        ]
        if all(same) and y.carried and not c.carried and not s.carried:
            return x, y, (_as_read(a, c), _as_read(a, s))
    return None


def _as_read(product: Wire, table: Wire) -> Wire:
    """A table as one of the products under a difference reads it: its dims say which is s."""
    difference = bare(product).producer
    assert difference is not None
    for wire in difference.operands:
        times = bare(wire).producer
        for operand in times.operands if times else ():
            if bare(operand) is table:
                return operand
    return table


def _whole(part: Wire) -> Wire | None:
    """What a wire is a part of."""
    op = uncast(part).made_by("slice", "chunk", "torch.every_second")
    return uncast(op.operands[0]) if op else None


def _complex(op: Op) -> _Rotation | None:
    """view_as_real(view_as_complex(x as pairs) · table)."""
    product = op.operands[0].made_by("mul")
    if product is None:
        return None
    pairs, table = _carried_first(product)
    number = pairs.made_by("aten.view_as_complex") if pairs else None
    if number is None or table is None:
        return None
    split = uncast(number.operands[0]).made_by("reshape")
    if split is None or split.result.rank != split.operands[0].rank + 1:
        return None
    return _Rotation(uncast(split.operands[0]), (table,), "interleaved")


def _real(op: Op) -> _Rotation | None:
    """add(mul(x, cos), mul(rotate(x), sin))."""
    for first, second in (op.operands, op.operands[::-1]):
        straight, turned = uncast(first).made_by("mul"), uncast(second).made_by("mul")
        if straight is None or turned is None:
            return None
        x, cos = _carried_first(straight)
        rotated, sin = _carried_first(turned)
        if x is None or rotated is None or cos is None or sin is None:
            return None
        if style := _rotate_style(uncast(rotated), uncast(x)):
            return _Rotation(uncast(x), (cos, sin), style)
    return None


_FORMS: dict[str, Callable[[Op], _Rotation | None]] = {
    "add": _real, "aten.view_as_real": _complex, "concat": _in_parts, "reshape": _in_pairs
}  # fmt: skip


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
    pairs = rotated.made_by("reshape")
    stacked = pairs.operands[0].made_by("concat") if pairs else None
    if stacked and stacked.result.dims[-1:] == ((2,),) and len(stacked.operands) == 2:
        first, second = (uncast(w).made_by("reshape") for w in stacked.operands)
        negative = uncast(first.operands[0]).made_by("neg") if first else None
        if negative and second and _is_every_second(negative.operands[0], x, 1):
            return "interleaved" if _is_every_second(second.operands[0], x, 0) else ""
    return ""


def _is_every_second(wire: Wire, x: Wire, start: int) -> bool:
    op = uncast(wire).made_by("torch.every_second")
    return (
        op is not None
        and uncast(op.operands[0]) is x
        and op.attributes == {"dim": x.rank - 1, "start": start}
    )


def _is_half(wire: Wire, x: Wire, index: int) -> bool:
    """Whether a wire is the first (0) or second (1) half of the last dim of x."""
    half = elements(x.dims[-1]) // 2
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


def _replace(
    draft: Draft, op: Op, found: _Rotation, table: Table, made: dict[Table, tuple[Wire, Wire]]
) -> None:
    x, sequence = found.x, _sequence_dim(found)
    if table not in made:
        made[table] = _add_tables(draft, table, x.dims[sequence], x.dims[-1])
    turned = sequence == 1  # [b, s, n, d]
    operand = _swapped(draft, x, op) if turned else x
    result = draft.add(
        "rotary", [operand, *made[table]], operand.dims, dtype=x.dtype,
        attributes={"style": table.style}, module=op.module, before=op,
    ).result  # fmt: skip
    if turned:
        result = _swapped(draft, result, op)
    draft.stand_in(op, result)


def _swapped(draft: Draft, x: Wire, op: Op) -> Wire:
    """Heads and sequence exchanged."""
    order = [0, 2, 1, 3]
    dims = tuple(x.dims[d] for d in order)
    return draft.add(
        "permute", [x], dims, attributes={"order": order}, module=op.module, before=op
    ).result


def _sequence_dim(found: _Rotation) -> int:
    """The dim of x along which the table varies: the one that it has besides batch and last."""
    table = found.tables[0]
    present = [i - table.rank for i, dim in enumerate(table.dims[:-1]) if dim and dim != ("b",)]
    return found.x.rank + present[-1] if present else 2


def _add_tables(
    draft: Draft, table: Table, s: tuple[Size, ...], d: tuple[Size, ...]
) -> tuple[Wire, Wire]:
    first = draft.ops[0]
    positions = draft.add("positions", [], (s,), dtype="int64", before=first)
    dims = ((), s, d)
    cos, sin = draft.add(
        "rotary_table", [positions.result], [dims, dims], count=2, dtype="model", before=first,
        attributes={
            "inv_freq": list(table.inv_freq), "scaling": table.scaling, "style": table.style,
        },
    ).results  # fmt: skip
    return cos, sin
