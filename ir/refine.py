"""From untyped ops to graphs: binds each op's factor rule and refines dims to common factors.

A linear layer's output dim is one loop `o` to the linear layer and `(k g d)` to the reshape that
follows. Types must mean the same at both ends of an edge, so every dim takes the common refinement
of what its producer and its consumers say, across all blocks of a model at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from .errors import InvalidInput, UnsupportedOp
from .graph import Dims, Graph, Op, Value
from .optable import TABLE
from .rule import FactorName, Rule, RuleDim, RuleShape, Size
from .shape_rules import merge, rule_for


@dataclass(frozen=True, slots=True)
class RawOp:
    """An op as a tracer finds it: kind, values and attributes, without a rule.

    `sizes` may fix factors that shapes alone do not determine (`{"k": 8}` of an attention).
    """

    name: str
    kind: str
    operands: tuple[str, ...]
    results: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    sizes: Mapping[FactorName, Size] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawGraph:
    """A graph before refinement. `values` hold dims as traced, one factor per dim."""

    values: Mapping[str, Value]
    ops: tuple[RawOp, ...]
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]


Link = tuple[tuple[str, str], tuple[str, str]]
"""((graph, value), (graph, value)): two values that are the same tensor across graphs."""


def refine(graphs: Mapping[str, RawGraph], links: Sequence[Link] = ()) -> dict[str, Graph]:
    """Binds rules and refines dims in all graphs together.

    Raises UnsupportedOp for an op kind without a line in the table, or of a form no rule fits.
    """
    state = _State(graphs)
    changed = True
    while changed:
        changed = False
        for key in state.rules:
            changed |= state.refine_op(key)
        for a, b in links:
            changed |= state.unify_values(a, b)
    return {name: state.build(name) for name in graphs}


OpKey = tuple[str, int]


class _State:
    """Factor lists of every value dim and of every op's loops, while they are being refined."""

    def __init__(self, graphs: Mapping[str, RawGraph]) -> None:
        self.graphs = graphs
        self.dims: dict[tuple[str, str], list[list[Size]]] = {
            (g, name): [list(dim) for dim in value.dims]
            for g, graph in graphs.items()
            for name, value in graph.values.items()
        }
        self.rules: dict[OpKey, Rule] = {}
        self.loops: dict[OpKey, dict[FactorName, list[Size]]] = {}
        for g, graph in graphs.items():
            for i, op in enumerate(graph.ops):
                self._bind((g, i), op)

    def _bind(self, key: OpKey, op: RawOp) -> None:
        where = f"op {op.kind!r} at {op.module or 'the top level'} ({op.name})"
        if op.kind not in TABLE:
            raise UnsupportedOp(
                f"{where}: no rule; add a line to ir/optable.py and one to the backend's op table"
            )
        operands = [self._dims(key[0], v) for v in op.operands]
        results = [self._dims(key[0], v) for v in op.results]
        try:
            rule = rule_for(TABLE[op.kind].rules, operands, results, op.attributes)
            self.loops[key] = self._solve(rule, operands + results, op.sizes)
        except InvalidInput as error:
            raise UnsupportedOp(f"{where}: shapes {operands} -> {results}: {error}") from None
        self.rules[key] = rule

    def _dims(self, graph: str, value: str) -> Dims:
        return tuple(tuple(dim) for dim in self.dims[graph, value])

    @staticmethod
    def _solve(
        rule: Rule, dims: Sequence[Dims], given: Mapping[FactorName, Size]
    ) -> dict[FactorName, list[Size]]:
        """Sizes of all factors, from dims that have one unknown factor each."""
        known: dict[FactorName, list[Size]] = {
            f: [] if size == 1 else [size] for f, size in given.items() if f in rule.factors
        }
        shapes = list(zip(rule.operands + rule.results, dims, strict=True))
        for shape, value in shapes:
            if len(shape) != len(value):
                raise InvalidInput(f"rule {rule}: a value of rank {len(value)} does not fit")
        progress = True
        while progress:
            progress = False
            for shape, value in shapes:
                for names, sizes in zip(shape, value, strict=True):
                    unknown = [f for f in names if f not in known]
                    if len(unknown) != 1:
                        continue
                    if len(names) == 1:
                        known[names[0]] = list(sizes)
                    else:
                        known[unknown[0]] = _quotient(
                            sizes, [s for f in names for s in known.get(f, [])], rule
                        )
                    progress = True
        if missing := [f for f in rule.factors if f not in known]:
            raise InvalidInput(f"rule {rule}: the size of {missing} is not determined")
        return known

    def refine_op(self, key: OpKey) -> bool:
        """One pass over an op's dims; True where something became finer."""
        op = self.graphs[key[0]].ops[key[1]]
        rule = self.rules[key]
        names = op.operands + op.results
        for k, shape in enumerate(rule.operands + rule.results):
            value = self.dims[key[0], names[k]]
            for dim, factors in enumerate(shape):
                mine = [size for f in factors for size in self.loops[key][f]]
                if mine == value[dim]:
                    continue
                common = merge(value[dim], mine)
                if common is None:
                    if _total(mine) != _total(value[dim]):
                        raise UnsupportedOp(
                            f"op {op.kind!r} at {op.module or 'the top level'} ({op.name}): "
                            f"{names[k]} has {value[dim]} in dim {dim}, rule {rule} needs {mine}"
                        )
                    self._lock(key, set(factors))
                    return True
                value[dim] = common
                self._deal(key, factors, common)
                return True
        return False

    def _deal(self, key: OpKey, factors: RuleDim, atoms: list[Size]) -> None:
        position = 0
        for factor in factors:
            old = self.loops[key][factor]
            start = position
            for size in old:
                while size != atoms[position]:
                    step = atoms[position]
                    assert isinstance(size, int) and isinstance(step, int)
                    size //= step
                    position += 1
                position += 1
            self.loops[key][factor] = atoms[start:position]

    def _lock(self, key: OpKey, conflict: set[FactorName]) -> None:
        """Two readings of a dim that have no common refinement: the op's loops over it are taken
        apart per value and locked."""
        rule = self.rules[key]
        values = self.graphs[key[0]].ops[key[1]].operands + self.graphs[key[0]].ops[key[1]].results
        loops = self.loops[key]
        dims_of_all = [set(dim) for shape in rule.operands + rule.results for dim in shape]
        while more := [d for d in dims_of_all if d & conflict and not d <= conflict]:
            conflict = conflict.union(*more)  # a dim is taken apart as a whole
        locked = set(rule.locked) - conflict
        shapes: list[RuleShape] = []
        for k, shape in enumerate(rule.operands + rule.results):
            dims: list[RuleDim] = []
            for dim, names in enumerate(shape):
                if conflict & set(names):
                    fresh = f"mixed{k}_{dim}"
                    loops[fresh] = list(self.dims[key[0], values[k]][dim])
                    locked.add(fresh)
                    names = (fresh,)
                dims.append(names)
            shapes.append(tuple(dims))
        count = len(rule.operands)
        fixed = Rule(tuple(shapes[:count]), tuple(shapes[count:]))
        self.rules[key] = replace(fixed, locked=frozenset(locked & set(fixed.factors)))

    def unify_values(self, a: tuple[str, str], b: tuple[str, str]) -> bool:
        """Gives two values the same dims; True where something became finer."""
        changed = False
        for dim, (x, y) in enumerate(zip(self.dims[a], self.dims[b], strict=True)):
            if x == y:
                continue
            common = merge(x, y)
            if common is None:
                raise InvalidInput(
                    f"{a[1]} of {a[0]} and {b[1]} of {b[0]} factor dim {dim} as {x} and {y}"
                )
            self.dims[a][dim], self.dims[b][dim] = list(common), list(common)
            changed = True
        return changed

    def build(self, name: str) -> Graph:
        graph = self.graphs[name]
        values = {v: replace(value, dims=self._dims(name, v)) for v, value in graph.values.items()}
        ops = tuple(self._op(name, i, op) for i, op in enumerate(graph.ops))
        return Graph(values, ops, graph.inputs, graph.parameters, graph.outputs)

    def _op(self, graph: str, index: int, raw: RawOp) -> Op:
        rule, loops = self.rules[graph, index], self.loops[graph, index]
        fine = {f: _fine_names(f, len(loops[f])) for f in rule.factors}
        sizes = {n: s for f in rule.factors for n, s in zip(fine[f], loops[f], strict=True)}

        def dims(shape: RuleShape) -> RuleShape:
            return tuple(tuple(n for f in dim for n in fine[f]) for dim in shape)

        bound = Rule(
            tuple(map(dims, rule.operands)),
            tuple(map(dims, rule.results)),
            frozenset(n for f in rule.locked for n in fine[f]),
        )
        return Op(
            raw.name, raw.kind, raw.operands, raw.results, bound, sizes,
            dict(raw.attributes), raw.module,
        )  # fmt: skip


def _total(sizes: Sequence[Size]) -> tuple[int, list[str]]:
    """The product of sizes: its number and its symbols."""
    return (
        prod(s for s in sizes if isinstance(s, int)),
        sorted(s for s in sizes if isinstance(s, str)),
    )


def _quotient(sizes: Sequence[Size], others: Sequence[Size], rule: Rule) -> list[Size]:
    """The sizes of the one factor of a dim that is left when the others are known."""
    number, symbols = _total(sizes)
    other_number, other_symbols = _total(others)
    for symbol in other_symbols:
        if symbol in symbols:
            symbols.remove(symbol)
            continue
        raise InvalidInput(f"rule {rule}: {list(sizes)} has no factors {list(others)}")
    left = number // other_number
    if number % other_number or (symbols and left > 1) or len(symbols) > 1:
        raise InvalidInput(f"rule {rule}: {list(sizes)} does not divide by {list(others)}")
    return [*symbols] if left == 1 else [left]


def _fine_names(factor: FactorName, count: int) -> tuple[FactorName, ...]:
    return (factor,) if count == 1 else tuple(f"{factor}_{i}" for i in range(count))
