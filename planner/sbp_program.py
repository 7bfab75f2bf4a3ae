"""The SBP program: which types the values of every distinct block take, as an integer program.

One-hot `x[op, signature]`. Every edge carries a transport `e[edge, τ→t]` with *equality* marginals:
`Σ_t e = y[τ]`, the producer's type, and `Σ_τ e = need[t]`, what the consumer reads. A conversion is
paid once however many consumers share it: `c[value, τ→t] ≥ e` of every edge that uses it. Minimised
are compute, conversions (forward and backward) and the price of storage.

All blocks of a model are solved together, each weighted by how often it occurs, and the types at
their boundaries are equal, so that the plan costs exactly the objective. The linear relaxation is
solved first; it is integral on real models and then proved optimal. Formulation: Alpa (Zheng et
al., 2022) and PyTorch AutoParallel, with transport variables per edge in place of products.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Literal, Protocol

import numpy as np

from ..ir import Infeasible
from ..ir.graph import Binding, Graph, Op, Value
from ..ir.mesh import Axis
from ..ir.plan import Annotation, OpTypes
from ..ir.types import AxisType, I, NdType, P, R, S
from .chain import Chain
from .linear_program import LinearProgram, Solver
from .signatures import Alias, NdSignature, aliases, is_view, nd_signatures, storage_types


class Costs(Protocol):
    """What the program minimises, in any one unit (seconds)."""

    def op(self, block: str, op: Op, signature: NdSignature) -> float:
        """Forward and backward compute of one occurrence."""

    def conversion(self, block: str, value: Value, source: NdType, target: NdType) -> float:
        """Forward conversion and its dual, once."""

    def storage(self, block: str, value: Value, kind: NdType) -> float:
        """Price of keeping a parameter (or a saved activation) in this type."""


@dataclass(frozen=True, slots=True)
class Typing:
    """A solved program: annotations of all blocks on the program's axes, and how it was solved."""

    annotations: Mapping[str, Annotation]
    objective: float
    method: Literal["integral", "mip"]
    size: tuple[int, int, int]


def solve(
    chain: Chain, axes: Sequence[Axis], binding: Binding, costs: Costs, solver: Solver = "highs"
) -> Typing:
    """The cheapest typing of all blocks over `axes`.

    Raises Infeasible where none exists (pins that contradict each other or do not divide).
    """
    return SbpProgram(chain, tuple(axes), binding, costs).solve(costs.storage, solver)


_Port = tuple[str, str]
Storage = Callable[[str, Value, NdType], float]
"""`Costs.storage`."""
Marginal = dict[NdType, list[int]]
"""Type → the variables whose sum says that the type is taken."""


class SbpProgram:
    """The program of a chain, assembled; it can be solved under several prices of storage."""

    def __init__(
        self, chain: Chain, axes: tuple[Axis, ...], binding: Binding, costs: Costs
    ) -> None:
        self.chain, self.axes, self.binding, self.costs = chain, axes, binding, costs
        self.program = LinearProgram()
        self.whole = NdType.uniform(tuple(a.name for a in axes), R)
        self.views = {block: aliases(graph) for block, graph in chain.blocks.items()}
        self.pins: dict[_Port, dict[str, tuple[AxisType, ...]]] = defaultdict(dict)
        for place in chain.pins:  # on a value, and on views of it
            pins = self.pins[self._base(*place)]
            for axis, kinds in self._base_pins(*place).items():
                pins[axis] = tuple(k for k in pins.get(axis, kinds) if k in kinds)
        self.choices: dict[tuple[str, str], list[tuple[NdSignature, int]]] = {}
        self._storable: dict[_Port, list[NdType]] = {}  # types of parameters with one reader
        self.kept: dict[_Port, dict[NdType, int]] = {}  # stored tied parameters, inputs, outputs
        # parameter with one reader, read as t → how it may be stored, and the seconds from there
        self.ways: dict[tuple[_Port, NdType], list[tuple[NdType, float]]] = {}
        self.reads: list[tuple[int, float, tuple[_Port, NdType]]] = []  # variable, weight, read
        self.stored: list[tuple[int, float, _Port, NdType]] = []  # variable, weight, kept as
        tied = {use for group in chain.tied for use in group}
        for block in chain.blocks:
            self._keep_boundary(block)
        for group in chain.tied:
            self._keep_tied(group)
        for block, graph in chain.blocks.items():
            self._ops(block, graph, tied)
        for block, graph in chain.blocks.items():
            self._edges(block, graph, tied)
        for (left, out), (right, entry) in chain.links:
            self._equal(self.kept[left, "out:" + out], self.kept[right, entry])

    def _base(self, block: str, value: str) -> _Port:
        """A value, or what it is a view of."""
        alias = self.views[block].get(value)
        return (block, alias.base if alias else value)

    def _base_pins(self, block: str, value: str) -> dict[str, tuple[AxisType, ...]]:
        """Per axis the types that the pins on a value allow what it is a view of.

        A pin on an axis holds for all its sub-axes; there `S(dim)` is a split of any factor of the
        dim. Raises Infeasible where the view mixes the factors a pin names.
        """
        alias = self.views[block].get(value)
        dims = self.chain.blocks[block].values[value].dims
        found: dict[str, tuple[AxisType, ...]] = {}
        for name, kind in self.chain.pins[block, value].items():
            axes = [a.name for a in self.axes if a.size > 1 and name in (a.name, a.parent)]
            kinds = [kind]
            if len(axes) > 1 and kind.is_split and kind.part == 0 and kind.dim < len(dims):
                kinds = [S(kind.dim, part) for part in range(len(dims[kind.dim]))]
            if alias:
                try:
                    kinds = [alias.base_type(NdType((("", k),)))[""] for k in kinds]
                except KeyError:
                    raise Infeasible(f"{value} of {block}: {kind} names no factor of it") from None
            found |= dict.fromkeys(axes, tuple(kinds))
        return found

    def solve(self, storage: Storage, solver: Solver = "highs") -> Typing:
        """The cheapest typing where keeping a parameter in a type costs what `storage` says."""
        costs = self.program.costs
        for variable, weight, (block, name), kind in self.stored:
            value = self.chain.blocks[block].values[name]
            costs[variable] += weight * storage(block, value, kind)
        folded: dict[tuple[_Port, NdType], tuple[float, str, NdType]] = {}
        for ((block, name), read), ways in self.ways.items():
            if not ways:
                continue
            value = self.chain.blocks[block].values[name]
            folded[(block, name), read] = min(
                (seconds + storage(block, value, kind), str(kind), kind) for kind, seconds in ways
            )
        for variable, weight, read_as in self.reads:
            costs[variable] += weight * folded[read_as][0]
        solution = self.program.solve(solver, costs)
        chosen = set(np.flatnonzero(solution.values > 0.5).tolist())
        kept_as = {read_as: kind for read_as, (_, _, kind) in folded.items()}
        return Typing(
            {block: self._annotation(block, chosen, kept_as) for block in self.chain.blocks},
            solution.objective,
            solution.method,
            self.program.size,
        )

    def keeps_least(self, typing: Typing, storage: Storage) -> bool:
        """Whether a typing stores every parameter as cheaply as any typing could."""
        options: dict[_Port, set[NdType]] = defaultdict(set)
        for _, _, port, kind in self.stored:
            options[port].add(kind)
        for (port, _), ways in self.ways.items():
            options[port].update(kind for kind, _ in ways)
        for (block, name), kinds in options.items():
            graph = self.chain.blocks[block]
            value, at = graph.values[name], graph.parameters.index(name)
            least = min(storage(block, value, kind) for kind in kinds)
            if storage(block, value, typing.annotations[block].parameters[at]) > least:
                return False
        return True

    # --- variables -------------------------------------------------------------------------------

    def _one_hot(
        self, kinds: Sequence[NdType], stored: _Port | None = None, weight: float = 1.0
    ) -> dict[NdType, int]:
        """One variable per type, of which one is 1; of a parameter, what it is stored as."""
        chosen = {kind: self.program.variable(integer=True) for kind in kinds}
        self.program.row([(v, 1.0) for v in chosen.values()], 1.0, 1.0)
        if stored is not None:
            self.stored += [(v, weight, stored, kind) for kind, v in chosen.items()]
        return chosen

    def _allowed(self, block: str, value: str, kinds: Sequence[NdType]) -> list[NdType]:
        """Types that agree with the pins on a value. Raises Infeasible naming a pin that cannot
        hold."""
        pins = self.pins.get((block, value), {})
        kept = [k for k in kinds if all(k[axis] in allowed for axis, allowed in pins.items())]
        if not kept:
            shown = ", ".join(
                f"{axis}={' or '.join(map(str, allowed))}" for axis, allowed in pins.items()
            )
            possible = sorted({str(k) for k in kinds})[:8]
            raise Infeasible(f"{value} of {block}: {shown} cannot hold; possible: {possible}")
        return kept

    def _keep_boundary(self, block: str) -> None:
        graph = self.chain.blocks[block]
        free = self.chain.free.get(block, frozenset())
        for name in graph.inputs:
            if name not in free:
                kinds = self._handed_on(graph.values[name])
                self.kept[block, name] = self._one_hot(self._allowed(block, name, kinds))
        for name in graph.outputs:
            value = graph.values[name]
            if name in self.chain.losses.get(block, frozenset()):
                kinds = _loss_types(value, self.axes)
            else:
                kinds = self._handed_on(value)
            self.kept[block, "out:" + name] = self._one_hot(kinds)

    def _handed_on(self, value: Value) -> tuple[NdType, ...]:
        """Types in which a value can pass from block to block. Raises Infeasible where it cannot
        be split along the sequence, but is to be."""
        kinds = storage_types(value, self.axes, self.binding)
        wanted = self.chain.sequence_split
        if wanted is None or not any("s" in dim for dim in value.dims):
            return kinds
        wide = [axis.name for axis in self.axes if axis.size > 1]

        def agrees(kind: AxisType) -> bool:
            if not wanted:
                return not kind.is_split
            return kind.is_split and value.dims[kind.dim][kind.part] == "s"

        found = tuple(k for k in kinds if all(agrees(k[axis]) for axis in wide))
        if not found:
            raise Infeasible(
                f"sp=1: the sequence length {self.binding['s']} does not divide by the "
                f"{prod(axis.size for axis in self.axes)} tensor-parallel devices"
            )
        return found

    def _keep_tied(self, group: tuple[_Port, ...]) -> None:
        block, name = group[0]
        value = self.chain.blocks[block].values[name]
        kinds = storage_types(value, self.axes, self.binding)
        for use in group:
            kinds = tuple(self._allowed(use[0], use[1], kinds))
        chosen = self._one_hot(kinds, (block, name))  # one logical parameter is stored once
        for use in group:
            self.kept[use] = chosen

    def _ops(self, block: str, graph: Graph, tied: set[_Port]) -> None:
        uses = graph.consumers()
        single = {
            name
            for name in graph.parameters
            if (block, name) not in tied and len(self._readers(block, graph, uses, name)) == 1
        }
        for op in graph.ops:
            if is_view(op):
                continue
            pinned = [i for i, r in enumerate(op.results) if (block, r) in self.pins]
            options = nd_signatures(op, graph.values, self.axes, self.binding)
            if self.chain.sequence_split is False:
                options = tuple(
                    s for s in options if all(op.sizes[f] != "s" for f in s.factors if f)
                )
            for i in pinned:
                kinds = self._allowed(block, op.results[i], [s.results[i] for s in options])
                options = tuple(s for s in options if s.results[i] in set(kinds))
            chosen: list[tuple[NdSignature, int]] = []
            weight = self.chain.counts[block]
            for signature in options:
                reads: list[tuple[_Port, NdType]] = []
                for k, operand in enumerate(op.operands):
                    alias = self.views[block].get(operand)
                    base = alias.base if alias else operand
                    if base in single:
                        read = signature.operands[k]
                        reads.append(((block, base), alias.base_type(read) if alias else read))
                if all(self._can_store(graph, *read_as) for read_as in reads):
                    cost = weight * self.costs.op(block, op, signature)
                    if cost < float("inf"):
                        variable = self.program.variable(cost, integer=True)
                        chosen.append((signature, variable))
                        self.reads += [(variable, weight, read_as) for read_as in reads]
            if not chosen:
                raise Infeasible(f"op {op.name} of {block}: no sharding fits the pins")
            self.choices[block, op.name] = chosen
            self.program.row([(v, 1.0) for _, v in chosen], 1.0, 1.0)
        for name in graph.parameters:
            if name not in single and (block, name) not in self.kept:
                stored = storage_types(graph.values[name], self.axes, self.binding)
                self.kept[block, name] = self._one_hot(
                    self._allowed(block, name, stored), (block, name), self.chain.counts[block]
                )

    def _can_store(self, graph: Graph, port: _Port, read: NdType) -> bool:
        """Whether a parameter with one reader can be stored so that it is read in a type."""
        if (port, read) not in self.ways:
            block, name = port
            value = graph.values[name]
            if port not in self._storable:
                kinds = storage_types(value, self.axes, self.binding)
                self._storable[port] = self._allowed(block, name, kinds)
            seconds = [
                (kind, self.costs.conversion(block, value, kind, read))
                for kind in self._storable[port]
            ]
            self.ways[port, read] = [each for each in seconds if each[1] < float("inf")]
        return bool(self.ways[port, read])

    # --- edges -----------------------------------------------------------------------------------

    def _readers(
        self, block: str, graph: Graph, uses: Mapping[str, list[tuple[Op, int]]], base: str
    ) -> list[tuple[Op, int, Alias | None]]:
        """(op, operand index, view) of everything that reads a value, directly or through views."""
        found: list[tuple[Op, int, Alias | None]] = []
        names: list[tuple[str, Alias | None]] = [(base, None)]
        names += [(n, a) for n, a in self.views[block].items() if a.base == base]
        for name, alias in names:
            found += [(op, k, alias) for op, k in uses[name] if not is_view(op)]
        return found

    def _edges(self, block: str, graph: Graph, tied: set[_Port]) -> None:
        uses = graph.consumers()
        free = self.chain.free.get(block, frozenset())
        producer = graph.producer()
        for name, value in graph.values.items():
            if name in free or name in self.views[block]:
                continue
            made: Marginal = defaultdict(list)
            if (block, name) in self.kept:
                for kind, variable in self.kept[block, name].items():
                    made[kind].append(variable)
            elif name in producer:
                op, index = producer[name]
                for signature, variable in self.choices[block, op.name]:
                    made[signature.results[index]].append(variable)
            else:
                continue  # a parameter folded into its only reader
            demands: list[tuple[str, Marginal]] = []
            for op, k, alias in self._readers(block, graph, uses, name):
                need: Marginal = defaultdict(list)
                for signature, variable in self.choices[block, op.name]:
                    kind = signature.operands[k]
                    need[alias.base_type(kind) if alias else kind].append(variable)
                demands.append((op.operands[k], need))
            for port in graph.outputs:
                alias = self.views[block].get(port)
                if port == name or (alias and alias.base == name):
                    leaves = self.kept[block, "out:" + port].items()
                    need = {alias.base_type(t) if alias else t: [v] for t, v in leaves}
                    demands.append((port, need))
            self._transport(block, value, made, demands)

    def _transport(
        self, block: str, value: Value, made: Marginal, demands: Sequence[tuple[str, Marginal]]
    ) -> None:
        """Ties the type a value is made in to the types it is read in.

        `demands`: per reader the name it reads (the value or a view of it) and the types. A
        conversion is shared by the readers of one name: the program converts what it has named.
        """
        weight = self.chain.counts[block]
        price: dict[tuple[NdType, NdType], float] = {}
        for source in made:
            for target in dict.fromkeys(t for _, need in demands for t in need):
                cost = weight * self.costs.conversion(block, value, source, target)
                if cost < float("inf"):
                    price[source, target] = cost
        readers = Counter((name, target) for name, need in demands for target in need)
        shared: dict[tuple[str, NdType, NdType], int] = {}
        for name, need in demands:
            leaving: dict[NdType, list[tuple[int, float]]] = defaultdict(list)
            arriving: dict[NdType, list[tuple[int, float]]] = defaultdict(list)
            for (source, target), cost in price.items():
                if target not in need:
                    continue
                if cost > 0 and readers[name, target] > 1:
                    flow = self.program.variable()
                    key = (name, source, target)
                    if key not in shared:
                        shared[key] = self.program.variable(cost)
                    self.program.row([(shared[key], 1.0), (flow, -1.0)], 0.0, float("inf"))
                else:
                    flow = self.program.variable(cost)
                leaving[source].append((flow, 1.0))
                arriving[target].append((flow, 1.0))
            for source, variables in made.items():
                self.program.row(leaving[source] + [(v, -1.0) for v in variables], 0.0, 0.0)
            for target, variables in need.items():
                self.program.row(arriving[target] + [(v, -1.0) for v in variables], 0.0, 0.0)

    def _equal(self, left: dict[NdType, int], right: dict[NdType, int]) -> None:
        for kind in {**left, **right}:
            terms = [
                (side[kind], sign) for side, sign in ((left, 1.0), (right, -1.0)) if kind in side
            ]
            self.program.row(terms, 0.0, 0.0)

    # --- reading the solution --------------------------------------------------------------------

    def _annotation(
        self,
        block: str,
        chosen: set[int],
        kept_as: Mapping[tuple[_Port, NdType], NdType],
    ) -> Annotation:
        graph = self.chain.blocks[block]
        ops: dict[str, OpTypes] = {}
        types: dict[str, NdType] = {}
        for name in graph.inputs:
            types[name] = self._picked(block, name, chosen) or self.whole
        for name in graph.parameters:
            kind = self._picked(block, name, chosen)
            if kind is not None:
                types[name] = kind
        for op in graph.ops:
            if is_view(op):
                continue
            signature = next(s for s, v in self.choices[block, op.name] if v in chosen)
            ops[op.name] = OpTypes(signature.operands, signature.results)
            types |= dict(zip(op.results, signature.results, strict=True))
        for op in graph.ops:  # parameters with one reader
            for k, operand in enumerate(op.operands):
                alias = self.views[block].get(operand)
                base = alias.base if alias else operand
                if base in graph.parameters and base not in types and not is_view(op):
                    read = ops[op.name].operands[k]
                    read = alias.base_type(read) if alias else read
                    types[base] = kept_as[(block, base), read]
        for name in graph.parameters:  # read by nothing
            types.setdefault(name, NdType.uniform(tuple(a.name for a in self.axes), I))
        for op in graph.ops:
            if is_view(op):
                (view,), (source,) = op.results, op.operands
                alias = self.views[block][view]
                types[view] = alias.view_type(types[alias.base])
                ops[op.name] = OpTypes((types[source],), (types[view],))
        outputs = []
        for name in graph.outputs:
            kind = self._picked(block, "out:" + name, chosen)
            assert kind is not None
            outputs.append(kind)
        return Annotation(
            tuple(types[n] for n in graph.inputs),
            tuple(types[n] for n in graph.parameters),
            ops,
            tuple(outputs),
        )

    def _picked(self, block: str, name: str, chosen: set[int]) -> NdType | None:
        options = self.kept.get((block, name), {})
        return next((kind for kind, variable in options.items() if variable in chosen), None)


def _loss_types(value: Value, axes: Sequence[Axis]) -> tuple[NdType, ...]:
    """A loss leaves as partial sums or equal on all ranks: its gradient is 1 on each."""
    kinds = (I if value.grad else R, P)
    names = [axis.name for axis in axes]
    choices = product(*(kinds if axis.size > 1 else kinds[:1] for axis in axes))
    return tuple(NdType(tuple(zip(names, kind, strict=True))) for kind in choices)
