"""Rules that depend on shapes: broadcasting, reshapes, permutations, reductions.

Each builder takes the operands' and results' dims and the attributes, and returns an unbound
`Rule`. The op table names them as `@builder`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import InvalidInput
from .graph import Dims
from .rule import Rule, RuleDim, RuleShape, Size, expand, parse

Builder = Callable[[Sequence[Dims], Sequence[Dims], Mapping[str, Any]], Rule]


def merge(a: Sequence[Size], b: Sequence[Size]) -> list[Size] | None:
    """The common refinement of two factorisations of one dim, or None where there is none.

    Example: `[32, 128]` and `[8, 512]` refine to `[8, 4, 128]`; `[2, 3]` and `[3, 2]` do not.
    """
    left, right = list(a), list(b)
    out: list[Size] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x == y:
            out.append(x)
        elif isinstance(x, str) or isinstance(y, str):
            return None
        elif x % y == 0:
            out.append(y)
            left.insert(0, x // y)
        elif y % x == 0:
            out.append(x)
            right.insert(0, y // x)
        else:
            return None
    return None if left or right else out


def _names(prefix: str, dims: Dims) -> RuleShape:
    return tuple((f"{prefix}{i}",) if dim else () for i, dim in enumerate(dims))


def broadcast(operands: Sequence[Dims], results: Sequence[Dims], _: Mapping[str, Any]) -> Rule:
    """Pointwise: dims are aligned from the right; dims of size 1 broadcast."""
    (result,) = results
    out = _names("n", result)
    shapes: list[RuleShape] = []
    for dims in operands:
        offset = len(result) - len(dims)
        shapes.append(tuple(out[offset + i] if dim else () for i, dim in enumerate(dims)))
    return Rule(tuple(shapes), (out,))


def reshape(operands: Sequence[Dims], results: Sequence[Dims], _: Mapping[str, Any]) -> Rule:
    """A reshape: the flattened tensor is cut wherever a dim of either side ends; the pieces are
    the factors. (Factors inside a piece, such as `b s` of a flattened batch, stay together.)"""
    (source,), (target,) = operands, results
    atoms = merge(
        [size for dim in source for size in dim], [size for dim in target for size in dim]
    )
    if atoms is None:  # mixes dims: everything is one locked loop
        return Rule(
            (_names("x", source),),
            (_names("y", target),),
            frozenset(n for d in _names("x", source) + _names("y", target) for n in d),
        )
    left, right = _ends(source, atoms), _ends(target, atoms)
    cuts = sorted({*left, *right})
    names = [f"n{sum(cut <= i for cut in cuts if cut)}" for i in range(len(atoms))]
    return Rule((_pieces(left, names),), (_pieces(right, names),))


def _ends(dims: Dims, atoms: list[Size]) -> list[int]:
    """Per dim the number of atoms up to its end."""
    ends: list[int] = []
    position = 0
    for dim in dims:
        rest = list(dim)
        while rest:
            atom, have = atoms[position], rest.pop(0)
            if atom != have:
                assert isinstance(atom, int) and isinstance(have, int)
                rest.insert(0, have // atom)
            position += 1
        ends.append(position)
    return ends


def _pieces(ends: list[int], names: list[str]) -> RuleShape:
    starts = [0, *ends][:-1]
    return tuple(tuple(dict.fromkeys(names[i:j])) for i, j in zip(starts, ends, strict=True))


def permute(operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]) -> Rule:
    """`order[i]` is the operand's dim that becomes dim i."""
    source = _names("n", operands[0])
    return Rule((source,), (tuple(source[i] for i in attributes["order"]),))


def expand_dims(operands: Sequence[Dims], results: Sequence[Dims], _: Mapping[str, Any]) -> Rule:
    """Dims of size 1 (or new leading dims) are repeated."""
    return broadcast(operands, results, {})


def _reduction(operands: Sequence[Dims], attributes: Mapping[str, Any], lock: bool) -> Rule:
    source = _names("n", operands[0])
    gone = {d % len(source) for d in attributes["dims"]}
    keepdim = attributes.get("keepdim", False)
    result: list[RuleDim] = []
    for i, dim in enumerate(source):
        if i not in gone:
            result.append(dim)
        elif keepdim:
            result.append(())
    locked = frozenset(n for i in gone for n in source[i]) if lock else frozenset()
    return Rule((source,), (tuple(result),), locked)


def reduce(operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]) -> Rule:
    """A sum: a split of a reduced dim leaves partial sums."""
    return _reduction(operands, attributes, lock=False)


def reduce_locked(
    operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]
) -> Rule:
    """A reduction that is no sum (mean over a split dim would divide by the wrong count)."""
    return _reduction(operands, attributes, lock=True)


def reduce_all(operands: Sequence[Dims], results: Sequence[Dims], _: Mapping[str, Any]) -> Rule:
    """A sum over all elements, and a count."""
    return Rule((_names("n", operands[0]),), tuple(() for _ in results))


def reduce_all_locked(
    operands: Sequence[Dims], results: Sequence[Dims], attributes: Mapping[str, Any]
) -> Rule:
    """A sum over all elements with a count that splits do not divide."""
    rule = reduce_all(operands, results, attributes)
    return Rule(rule.operands, rule.results, frozenset(rule.factors))


def matmul(operands: Sequence[Dims], _: Sequence[Dims], __: Mapping[str, Any]) -> Rule:
    """`... m k, ... k n -> ... m n`, leading dims broadcast."""
    left, right = operands
    rank = max(len(left), len(right))
    lead_left, lead_right = left[:-2], right[:-2]
    shape: list[RuleDim] = []
    sides: tuple[list[RuleDim], list[RuleDim]] = ([], [])
    for i in range(rank - 2):
        dims = []
        for side, lead in zip(sides, (lead_left, lead_right), strict=True):
            j = i - (rank - 2 - len(lead))
            if j >= 0:
                name: RuleDim = (f"n{i}",) if lead[j] else ()
                side.append(name)
                dims.append(name)
        shape.append(max(dims))
    m = ("m",) if left[-2] else ()
    n = ("o",) if right[-1] else ()
    h = ("h",) if left[-1] else ()
    return Rule(
        ((*sides[0], m, h), (*sides[1], h, n)),
        ((*shape, m, n),),
    )


def chunk(operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]) -> Rule:
    """Equal consecutive pieces of one dim: `(c r) -> r` each, with `c` locked."""
    source = list(_names("n", operands[0]))
    dim = attributes["dim"] % len(source)
    result = tuple(("r",) if i == dim else d for i, d in enumerate(source))
    source[dim] = ("c", "r")
    return Rule((tuple(source),), (result,) * attributes["count"], frozenset({"c"}))


def slice_dim(operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]) -> Rule:
    """A range of one dim; that dim is locked."""
    source = list(_names("n", operands[0]))
    dim = attributes["dim"] % len(source)
    result = list(source)
    source[dim], result[dim] = ("whole",), ("range",)
    return Rule((tuple(source),), (tuple(result),), frozenset({"whole", "range"}))


def concat(operands: Sequence[Dims], _: Sequence[Dims], attributes: Mapping[str, Any]) -> Rule:
    """Operands one after the other along a dim; that dim is locked."""
    base = _names("n", operands[0])
    dim = attributes["dim"] % len(base)
    shapes = tuple(
        tuple((f"piece{k}",) if i == dim else d for i, d in enumerate(base))
        for k in range(len(operands))
    )
    result = tuple(("all",) if i == dim else d for i, d in enumerate(base))
    locked = frozenset({"all", *(f"piece{k}" for k in range(len(operands)))})
    return Rule(shapes, (result,), locked)


def fixed(operands: Sequence[Dims], results: Sequence[Dims], _: Mapping[str, Any]) -> Rule:
    """Made from nothing: positions, constants; whole on every rank."""
    shapes = tuple(_names(f"r{k}_", dims) for k, dims in enumerate(results))
    return Rule((), shapes, frozenset(n for shape in shapes for dim in shape for n in dim))


_BUILDERS: dict[str, Builder] = {
    "broadcast": broadcast,
    "reshape": reshape,
    "permute": permute,
    "expand": expand_dims,
    "reduce": reduce,
    "reduce_locked": reduce_locked,
    "reduce_all": reduce_all,
    "reduce_all_locked": reduce_all_locked,
    "matmul": matmul,
    "chunk": chunk,
    "slice": slice_dim,
    "concat": concat,
    "fixed": fixed,
}


def rule_for(
    rules: Sequence[str],
    operands: Sequence[Dims],
    results: Sequence[Dims],
    attributes: Mapping[str, Any],
) -> Rule:
    """The rule of an op from its table line and the dims at hand.

    Raises InvalidInput when none of the line's rules fits.
    """
    if rules[0].startswith("@"):
        return _BUILDERS[rules[0][1:]](operands, results, attributes)
    problems: list[str] = []
    for text in rules:
        try:
            rule = expand(parse(text), tuple(len(dims) for dims in operands))
        except InvalidInput as error:
            problems.append(str(error))
            continue
        if all(
            dims[i] == ()
            for shape, dims in zip(rule.operands, operands, strict=True)
            for i, names in enumerate(shape)
            if names == ()
        ):
            return rule
        problems.append(f"rule {text!r}: a dim that must be 1 is not")
    raise InvalidInput("; ".join(problems))
