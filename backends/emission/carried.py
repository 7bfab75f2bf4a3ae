"""What stages send each other: the table CARRIED of model.py."""

from __future__ import annotations

from ...ir.graph import Value
from .target import LiveType, Target
from .wiring import Wiring

_COMMENT = "# what stage i sends to the next: shapes for b sequences of s tokens, dtype, types"


def carried_table(wiring: Wiring) -> list[str]:
    """The lines of CARRIED: per boundary a tuple of `Carried`, whose shapes are local."""
    boundaries = range(len(wiring.plan.stages) - 1)
    rows = [", ".join(_carried(wiring, name) for name in wiring.carried(i)) for i in boundaries]
    listed = [f"    ({row},)," for row in rows]
    return [_COMMENT, *(["CARRIED = (", *listed, ")"] if listed else ["CARRIED = ()"])]


def _carried(wiring: Wiring, name: str) -> str:
    value, types = wiring.values[name], wiring.types[name]
    kinds = ", ".join(f'"{axis}": "{kind}"' for axis, kind in types)
    shape = _shape(wiring.target, value, types)
    return f'Carried("{name}", lambda b, s: {shape}, "{value.dtype}", {{{kinds}}})'


def _shape(target: Target, value: Value, types: LiveType) -> str:
    dims = []
    for dim in target.local(value, types):
        number, texts = 1, []
        for size in dim:
            number *= size.number or 1
            if size.symbol:
                texts.append(size.text({"b": "b", "s": "s"}))
        texts += [str(number)] if number > 1 or not texts else []
        dims.append(texts[0] if len(texts) == 1 else " * ".join(f"({t})" for t in texts))
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"
