"""where(): masks that are filled, and activations that are written with one."""

from __future__ import annotations

from typing import Any

from ..lift.draft import Wire
from .call import Call
from .flatten import Source, literal_of

Made = Wire | None


def at_least(call: Call, x: Wire, number: Any) -> Wire:
    """max(x, c) = relu(x - c) + c."""
    dims, dtype = x.dims, x.dtype
    if number == 0:
        return call.add("relu", [x], dims, dtype)
    over = call.add("relu", [call.add("shift", [x], dims, dtype, term=-number)], dims, dtype)
    return call.add("shift", [over], dims, dtype, term=number)


def select(call: Call) -> Made:
    """where(mask, x, number)."""
    if len(call.wires) != 3:
        return None
    mask, other, x = call.wires  # False picks the first
    if mask.carried:
        return _piecewise(call)
    value, filled = call.number(1), call.number(2)
    dims = call.dims()
    if (chosen := call.number(0)) is not None:
        return call.broadcast(x if chosen else other, dims)
    if value is not None and not mask.carried:
        x = call.broadcast(x, dims)
        return call.add("torch.keep", [x, mask], dims, call.dtype(), value=value)
    if filled is not None and not mask.carried:
        other = call.broadcast(other, dims)
        return call.add("torch.masked_fill", [other, mask], dims, call.dtype(), value=filled)
    return None


def _piecewise(call: Call) -> Made:
    """where(x > number, a, b) where that is an activation: x on one side, and on the other side

    slope * x                       leaky_relu, of 0
    alpha * expm1(least(x, 0))      elu, of 0
    the number                      the greater, or the lesser, of x and the number
    """
    test, low, high = call.node.operands
    if test.node is None or test.node.name not in ("ge", "gt", "le", "lt"):
        return None
    x, number = test.node.operands[0], literal_of(test.node.operands[1])
    low_wire, high_wire = call.wires[1:]
    if test.node.name in ("le", "lt"):
        low, high, low_wire, high_wire = high, low, high_wire, low_wire
    if number is None:
        return None
    dims, dtype = call.dims(), call.dtype()
    inner, least, most = _bounded(high)
    if literal_of(low) == number and inner is x and least < number <= most:
        return at_least(call, high_wire, number)
    inner, least, most = _bounded(low)
    if literal_of(high) == number and inner is x and least <= number < most:
        negated = at_least(call, call.add("neg", [low_wire], dims, dtype), -number)
        return call.add("neg", [negated], dims, dtype)
    if high is not x or number != 0:
        return None
    alpha, inner = _scaled(low)
    if inner is x:
        return call.add("leaky_relu", [high_wire], dims, dtype, slope=alpha)
    if inner.node is not None and inner.node.name == "expm1" and _negative(inner, x):
        return call.add("elu", [high_wire], dims, dtype, alpha=alpha)
    return None


def _bounded(source: Source) -> tuple[Source, float, float]:
    """(x, least, most) of where(x > number, x, number) and its like; infinities where there is
    none."""
    infinite = float("inf")
    node = source.node
    if node is None or node.name != "select_n" or len(node.operands) != 3:
        return source, -infinite, infinite
    test, low, high = node.operands
    if test.node is None or test.node.name not in ("ge", "gt", "le", "lt"):
        return source, -infinite, infinite
    if test.node.name in ("le", "lt"):
        low, high = high, low
    x, number = test.node.operands[0], literal_of(test.node.operands[1])
    if number is not None and high is x and literal_of(low) == number:
        return x, number, infinite
    if number is not None and low is x and literal_of(high) == number:
        return x, -infinite, number
    return source, -infinite, infinite


def _scaled(source: Source) -> tuple[float, Source]:
    """(number, x) of number * x."""
    if source.node is not None and source.node.name == "mul":
        for factor, x in (source.node.operands, source.node.operands[::-1]):
            if (number := literal_of(factor)) is not None:
                return float(number), x
    return 1.0, source


def _negative(expm1: Source, x: Source) -> bool:
    """expm1(where(x > 0, 0, x)), of which only x <= 0 is looked at."""
    assert expm1.node is not None
    inner, _, most = _bounded(expm1.node.operands[0])
    return inner is x and most == 0
