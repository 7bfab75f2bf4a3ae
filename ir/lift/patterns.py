"""Patterns over the draft, written as the expressions they match.

    "mul(mul(x, rsqrt(shift(mean(power(x, exponent=2), dims=dims), term=eps))), weight)"

A call matches an op of that kind, a name binds a wire (twice the same name: the same wire), a
keyword compares or binds an attribute; numbers compare to six digits. Casts between floating dtypes
and reshapes that add or drop dims of size 1 are looked through, and names bind the wire before
them. `add` and `mul` match in both orders;
`a | b` matches either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isclose
from typing import Any

from .draft import Wire, bare

_COMMUTATIVE = ("add", "mul")


@dataclass(frozen=True, slots=True)
class Match:
    """What the names of a pattern stand for."""

    wires: Mapping[str, Wire] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


@cache
def _parsed(pattern: str) -> ast.expr:
    return ast.parse(pattern.strip(), mode="eval").body


def match(pattern: str, wire: Wire) -> Match | None:
    """The first way in which the pattern matches what makes `wire`, or None."""
    return next(matches(pattern, wire), None)


def matches(pattern: str, wire: Wire) -> Iterator[Match]:
    """Every way in which the pattern matches."""
    yield from _match(_parsed(pattern), wire, Match())


def _match(pattern: ast.expr, wire: Wire, so_far: Match) -> Iterator[Match]:
    wire = bare(wire)
    if isinstance(pattern, ast.Name):
        bound = so_far.wires.get(pattern.id)
        if bound is None:
            yield Match({**so_far.wires, pattern.id: wire}, so_far.numbers)
        elif bound is wire:
            yield so_far
        return
    if isinstance(pattern, ast.BinOp):  # a | b
        yield from _match(pattern.left, wire, so_far)
        yield from _match(pattern.right, wire, so_far)
        return
    assert isinstance(pattern, ast.Call) and isinstance(pattern.func, ast.Name)
    op = wire.made_by(pattern.func.id)
    if op is None or len(op.operands) != len(pattern.args):
        return
    numbers = _attributes(pattern, op.attributes, so_far.numbers)
    if numbers is None:
        return
    start = Match(so_far.wires, numbers)
    yield from _operands(pattern.args, op.operands, start)
    if op.kind in _COMMUTATIVE:
        yield from _operands(pattern.args, op.operands[::-1], start)


def _operands(patterns: list[ast.expr], wires: list[Wire], so_far: Match) -> Iterator[Match]:
    if not patterns:
        yield so_far
        return
    for found in _match(patterns[0], wires[0], so_far):
        yield from _operands(patterns[1:], wires[1:], found)


def _attributes(
    pattern: ast.Call, attributes: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    found = dict(numbers)
    for keyword in pattern.keywords:
        assert keyword.arg is not None
        value = attributes.get(keyword.arg)
        if isinstance(keyword.value, ast.Name):
            if found.setdefault(keyword.value.id, value) != value:
                return None
        elif not _same(ast.literal_eval(keyword.value), value):
            return None
    return found


def _same(want: Any, have: Any) -> bool:
    if isinstance(want, (int, float)) and isinstance(have, (int, float)):
        return isclose(want, have, rel_tol=1e-6)
    return bool(want == have)
