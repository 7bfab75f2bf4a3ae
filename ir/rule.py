"""Factor rules: index notation that says which dims of operands and results are the same loop.

    "b s h, o h -> b s o"           a linear layer; h is contracted
    "b s (k g d) -> b s k g d"      a reshape
    "... h, h -> ... h"             `...` stands for any number of leading dims
    "b s 1, b s h -> b s h"         a broadcast dim of size 1 is no loop
    "v h, ... -> ... h; v!"         flags after `;`: `h!` locks a factor (it cannot be split)
    "n, -> n", "[] -> "             a scalar has no dims; alone on the left it is written `[]`, for
                                    nothing there means no operand

A rule is parsed once and bound to the shapes of an op; everything else (signatures, FLOPs, shapes
of shards, legality) is derived from the bound rule.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from .errors import InvalidInput

FactorName = str
Size = int | str
"""A number of elements, or the symbol that stands for it (`b`, `s`)."""

RuleDim = tuple[FactorName, ...]
"""Factors of one dim, outermost first; empty for a broadcast dim of size 1."""
RuleShape = tuple[RuleDim, ...]

_TOKEN = re.compile(r"\s*(\.\.\.|[A-Za-z_][A-Za-z_0-9]*|1|[()])")


@dataclass(frozen=True, slots=True)
class Rule:
    """Operand and result dims as tuples of factor names, and the factors that cannot be split."""

    operands: tuple[RuleShape, ...]
    results: tuple[RuleShape, ...]
    locked: frozenset[FactorName] = frozenset()

    def __str__(self) -> str:
        def show(shape: RuleShape) -> str:
            dims = [d[0] if len(d) == 1 else f"({' '.join(d)})" if d else "1" for d in shape]
            return " ".join(dims)

        left = "[]" if self.operands == ((),) else ", ".join(map(show, self.operands))
        text = f"{left} -> {', '.join(map(show, self.results))}"
        locks = " ".join(f"{f}!" for f in sorted(self.locked))
        return f"{text}; {locks}" if locks else text

    @property
    def factors(self) -> tuple[FactorName, ...]:
        """All factor names, in order of appearance."""
        seen: dict[FactorName, None] = {}
        for shape in self.operands + self.results:
            for dim in shape:
                seen.update(dict.fromkeys(dim))
        return tuple(seen)

    def position(self, shape: RuleShape, factor: FactorName) -> tuple[int, int] | None:
        """(dim, part) of a factor in an operand or result, or None where the shape lacks it."""
        for dim, names in enumerate(shape):
            if factor in names:
                return dim, names.index(factor)
        return None

    @property
    def contracted(self) -> frozenset[FactorName]:
        """Factors of operands that no result has: a split of them leaves partial sums."""
        kept = {f for shape in self.results for dim in shape for f in dim}
        return frozenset(f for f in self.factors if f not in kept)


@cache
def parse(text: str) -> Rule:
    """Parses index notation; an ellipsis stays as the factor `...` until `expand`.

    Raises InvalidInput quoting the text and the place.
    """
    body, _, flags = text.partition(";")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise InvalidInput(f"rule {text!r}: expected 'operands -> results'")
    locked = set()
    for flag in flags.split():
        if not flag.endswith("!"):
            raise InvalidInput(f"rule {text!r}: flag {flag!r}, expected 'factor!'")
        locked.add(flag[:-1])
    rule = Rule(
        tuple(_parse_shape(text, part) for part in left.split(",")) if left.strip() else (),
        tuple(_parse_shape(text, part) for part in right.split(",")),
        frozenset(locked),
    )
    if unknown := locked - set(rule.factors):
        raise InvalidInput(f"rule {text!r}: locks {sorted(unknown)}, which no operand has")
    return rule


def _parse_shape(text: str, part: str) -> RuleShape:
    dims: list[RuleDim] = []
    group: list[FactorName] | None = None
    position = 0
    part = part.strip()
    if part == "[]":
        return ()
    while position < len(part):
        match = _TOKEN.match(part, position)
        if match is None:
            raise InvalidInput(f"rule {text!r}: unexpected {part[position:]!r}")
        token, position = match.group(1), match.end()
        if token == "(":
            if group is not None:
                raise InvalidInput(f"rule {text!r}: '(' inside '('")
            group = []
        elif token == ")":
            if group is None:
                raise InvalidInput(f"rule {text!r}: ')' without '('")
            dims.append(tuple(group))
            group = None
        elif token == "1":
            if group is None:
                dims.append(())
        elif group is not None:
            group.append(token)
        else:
            dims.append((token,))
    if group is not None:
        raise InvalidInput(f"rule {text!r}: '(' without ')'")
    names = [f for dim in dims for f in dim]
    if len(set(names)) != len(names):
        raise InvalidInput(f"rule {text!r}: a factor appears twice in {part!r}")
    return tuple(dims)


def expand(rule: Rule, ranks: tuple[int, ...]) -> Rule:
    """Replaces `...` by as many factors as the operands' ranks ask for.

    Raises InvalidInput when the number of operands or a rank does not fit.
    """
    if len(ranks) != len(rule.operands):
        raise InvalidInput(f"rule {rule}: {len(rule.operands)} operands, got {len(ranks)}")
    lead = -1
    for shape, rank in zip(rule.operands, ranks, strict=True):
        if ("...",) in shape:
            count = rank - (len(shape) - 1)
            if count < 0 or lead not in (-1, count):
                raise InvalidInput(f"rule {rule}: operands of rank {ranks} do not fit")
            lead = count
        elif rank != len(shape):
            raise InvalidInput(f"rule {rule}: operands of rank {ranks} do not fit")
    if lead < 0:
        return rule
    names = tuple((f"n{i}",) for i in range(lead))

    def replace(shape: RuleShape) -> RuleShape:
        out: list[RuleDim] = []
        for dim in shape:
            out.extend(names if dim == ("...",) else (dim,))
        return tuple(out)

    locked = rule.locked - {"..."}
    if "..." in rule.locked:
        locked |= {dim[0] for dim in names}
    return Rule(tuple(map(replace, rule.operands)), tuple(map(replace, rule.results)), locked)
