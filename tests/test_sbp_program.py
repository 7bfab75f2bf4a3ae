"""The SBP program equals brute force, and finds the layouts the field knows by name."""

from __future__ import annotations

import random
from itertools import product

import pytest

from shardwright.ir import AxisType, NdType, Op, Value
from shardwright.ir.graph import Graph
from shardwright.ir.mesh import Axis
from shardwright.ir.refine import RawGraph, RawOp, refine
from shardwright.planner.chain import Chain
from shardwright.planner.sbp_program import solve
from shardwright.planner.signatures import NdSignature, is_view, nd_signatures, storage_types

BINDING = {"b": 4, "s": 4}
H = 4


class RandomCosts:
    """Arbitrary but reproducible prices; conversions to the same type are free."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _draw(self, *key: object) -> float:
        return random.Random(repr((self.seed, *key))).choice([0.0, 1.0, 2.0, 3.5, 7.25, 11.0])

    def op(self, block: str, op: Op, signature: NdSignature) -> float:
        return self._draw(block, op.name, signature)

    def conversion(self, block: str, value: Value, source: NdType, target: NdType) -> float:
        return 0.0 if source == target else 0.5 + self._draw(block, value.name, source, target)

    def storage(self, block: str, value: Value, kind: NdType) -> float:
        return self._draw(block, value.name, kind)


def random_graph(rng: random.Random, ops: int) -> Graph:
    """A random DAG over [b, s, h] activations from kinds of every linearity."""
    dims = (("b",), ("s",), (H,))
    values = {"x": Value("x", dims)}
    nodes: list[RawOp] = []
    made = ["x"]
    parameters: list[str] = []
    for i in range(ops):
        result = f"v{i}"
        kind = rng.choice(["linear", "add", "mul", "silu", "rms_norm", "permute", "cast"])
        source = rng.choice(made[-2:])
        operands: tuple[str, ...] = (source,)
        attributes: dict[str, object] = {}
        out_dims = values[source].dims
        if kind in ("add", "mul"):
            same = [v for v in made if values[v].dims == out_dims]
            operands = (source, rng.choice(same))
        elif kind == "linear":
            weight = f"w{i}"
            parameters.append(weight)
            last = out_dims[-1]
            values[weight] = Value(weight, ((H,), last), role="parameter")
            operands, out_dims = (source, weight), (*out_dims[:-1], (H,))
        elif kind == "rms_norm":
            weight = f"w{i}"
            parameters.append(weight)
            values[weight] = Value(weight, (out_dims[-1],), role="parameter")
            operands = (source, weight)
        elif kind == "permute":
            attributes = {"order": [1, 0, 2]}
            out_dims = (out_dims[1], out_dims[0], out_dims[2])
        values[result] = Value(result, out_dims)
        nodes.append(RawOp(result, kind, operands, (result,), attributes))
        made.append(result)
    raw = RawGraph(values, tuple(nodes), ("x",), tuple(parameters), (made[-1],))
    return refine({"block": raw})["block"]


def brute_force(
    chain: Chain, graph: Graph, axes: list[Axis], costs: RandomCosts, looped: bool
) -> float:
    """The optimum by trying every signature of every op and every boundary type.

    Views are ops like any other here, with a signature of their own: that the program may treat
    them as names of their operand is part of what is tested.
    """
    block, count = "block", chain.counts["block"]
    options = [nd_signatures(op, graph.values, axes, BINDING) for op in graph.ops]
    entry = storage_types(graph.values["x"], axes, BINDING)
    leave = storage_types(graph.values[graph.outputs[0]], axes, BINDING)
    best = float("inf")
    for choice in product(*options):
        total = sum(
            costs.op(block, op, s)
            for op, s in zip(graph.ops, choice, strict=True)
            if not is_view(op)
        )
        if total * count >= best:
            continue
        made: dict[str, NdType] = {}
        needs: dict[str, list[NdType]] = {name: [] for name in graph.values}
        for op, signature in zip(graph.ops, choice, strict=True):
            made |= dict(zip(op.results, signature.results, strict=True))
            for name, kind in zip(op.operands, signature.operands, strict=True):
                needs[name].append(kind)

        def paid(name: str, source: NdType, extra: tuple[NdType, ...] = ()) -> float:
            pairs = {(source, kind) for kind in (*needs[name], *extra)}  # noqa: B023
            return sum(costs.conversion(block, graph.values[name], s, t) for s, t in pairs)

        out = graph.outputs[0]
        for name in graph.values:
            if name in graph.parameters:
                kinds = storage_types(graph.values[name], axes, BINDING)
                total += min(
                    costs.storage(block, graph.values[name], k) + paid(name, k) for k in kinds
                )
            elif name not in ("x", out):
                total += paid(name, made[name])
        if looped:
            total += min(
                paid("x", k) + paid(out, made[out], (k,)) for k in entry if k in set(leave)
            )
        else:
            total += min(paid("x", k) for k in entry)
            total += min(paid(out, made[out], (k,)) for k in leave)
        best = min(best, total * count)
    return best


def random_chain(graph: Graph, looped: bool) -> Chain:
    links = (((("block", graph.outputs[0])), ("block", "x")),) if looped else ()
    return Chain({"block": graph}, {"block": 3 if looped else 1}, links)


class ViewFreeCosts(RandomCosts):
    """Prices that do not depend on which view of a value is meant: a view has its operand's data,
    so converting one costs what converting the other costs."""

    def __init__(self, seed: int, graph: Graph) -> None:
        super().__init__(seed)
        from shardwright.planner.signatures import aliases

        self.aliases = aliases(graph)

    def conversion(self, block: str, value: Value, source: NdType, target: NdType) -> float:
        alias = self.aliases.get(value.name)
        if alias:
            source, target = alias.base_type(source), alias.base_type(target)
        name = alias.base if alias else value.name
        return 0.0 if source == target else 0.5 + self._draw(block, name, source, target)


def without_views(graph: Graph) -> bool:
    return not any(is_view(op) for op in graph.ops)


@pytest.mark.parametrize("seed", range(120))
def test_equals_brute_force_on_one_axis(seed: int) -> None:
    rng = random.Random(seed)
    graph = random_graph(rng, ops=rng.choice([2, 3, 4]))
    while not without_views(graph):
        graph = random_graph(rng, ops=3)
    looped = seed % 2 == 0 and graph.values["x"].dims == graph.values[graph.outputs[0]].dims
    chain = random_chain(graph, looped)
    axes = [Axis("tp", 2)]
    costs = RandomCosts(seed)
    found = solve(chain, axes, BINDING, costs)
    assert found.objective == pytest.approx(
        brute_force(chain, graph, axes, costs, looped), abs=1e-9
    )


@pytest.mark.parametrize("seed", range(200, 280))
def test_equals_brute_force_on_two_axes(seed: int) -> None:
    rng = random.Random(seed)
    graph = random_graph(rng, ops=2)
    while not without_views(graph):
        graph = random_graph(rng, ops=2)
    looped = seed % 2 == 0
    chain = random_chain(graph, looped)
    axes = [Axis("dp", 2), Axis("tp", 2 if seed % 3 else 4)]
    costs = RandomCosts(seed)
    found = solve(chain, axes, BINDING, costs)
    assert found.objective == pytest.approx(
        brute_force(chain, graph, axes, costs, looped), abs=1e-9
    )


def annotated_cost(chain: Chain, graph: Graph, found: object, costs: RandomCosts) -> float:
    """What a typing costs, added up from its annotation alone."""
    annotation = found.annotations["block"]  # type: ignore[attr-defined]
    total = 0.0
    made, needs = annotation.produced(graph), annotation.needed(graph)
    for name, kinds in needs.items():
        for kind in kinds:
            total += costs.conversion("block", graph.values[name], made[name], kind)
    for name in graph.parameters:
        total += costs.storage("block", graph.values[name], made[name])
    return total


@pytest.mark.parametrize("seed", range(60))
def test_the_annotation_costs_what_the_objective_says(seed: int) -> None:
    """Conversions and storage are priced, ops are free: then the annotation alone tells the sum."""
    rng = random.Random(1000 + seed)
    graph = random_graph(rng, ops=rng.choice([3, 5, 8]))

    class OnlyMoves(ViewFreeCosts):
        def op(self, block: str, op: Op, signature: NdSignature) -> float:
            return 0.0

    costs = OnlyMoves(seed, graph)
    chain = random_chain(graph, looped=False)
    found = solve(chain, [Axis("tp", 2)], BINDING, costs)
    assert annotated_cost(chain, graph, found, costs) == pytest.approx(found.objective, abs=1e-9)


def test_a_pin_that_cannot_hold_is_named() -> None:
    from shardwright.ir import Infeasible

    graph = random_graph(random.Random(3), ops=2)
    name = graph.ops[0].results[0]
    pins = {("block", name): {"tp": AxisType("S", 7, 0)}}
    chain = Chain({"block": graph}, {"block": 1}, pins=pins)
    with pytest.raises(Infeasible, match=name):
        solve(chain, [Axis("tp", 2)], BINDING, RandomCosts(0))
