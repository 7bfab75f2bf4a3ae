"""What mixtures of experts are made of: the choice of experts, and products of rows in groups."""

from __future__ import annotations

from ..errors import UnsupportedOp
from ..lift.draft import Wire
from .call import Call
from .flatten import place


def top_k(call: Call) -> list[Wire] | None:
    """The k largest along the last dim, and where they are: what routers choose."""
    (x,), k = call.wires, call.params.get("k")
    if not x.carried or int(call.params.get("axis", -1)) not in (-1, x.rank - 1):
        return None
    made = call.draft.add(
        "choose", [x], [call.dims(0), call.dims(1)], count=2, dtype=x.dtype, module=call.module,
        attributes={"k": int(k if k is not None else call.node.results[0].shape[-1]),
                    "place": place(call.node.info)},
    ).results  # fmt: skip
    made[1].dtype, made[1].grad = call.dtype(1), False
    return made


def ragged_dot(call: Call) -> Wire:
    """Rows in groups, each times a matrix of its own."""
    numbers = call.params["ragged_dot_dimension_numbers"]
    (summed_x, summed_w), both = numbers.dot_dimension_numbers
    plain = (
        tuple(numbers.lhs_ragged_dimensions) == (0,) == tuple(numbers.rhs_group_dimensions)
        and not any(both)
        and tuple(summed_x) == (1,)
        and tuple(summed_w) in ((1,), (2,))
        and [wire.rank for wire in call.wires] == [2, 3, 1]
        and call.params.get("group_offset") is None
    )
    if not plain:
        shown = ", ".join(str(list(wire.dims)) for wire in call.wires)
        raise UnsupportedOp(
            f"op ragged_dot at {place(call.node.info)} (operands {shown}): expected rows "
            "[tokens, inputs], weights [experts, inputs, outputs] or [experts, outputs, inputs] "
            "and a size for every expert, without batch dims and offsets"
        )
    return call.draft.add(
        "ragged_linear", call.wires, call.dims(), dtype=call.dtype(), module=call.module,
        attributes={"inputs_first": tuple(summed_w) == (1,), "place": place(call.node.info)},
    ).result  # fmt: skip
