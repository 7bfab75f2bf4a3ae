"""The inside of blocks for one tensor-parallel mesh and micro-batch: solved once, priced per mode.

`Inner` is what the search over stages needs to know of a model: per distinct block and recompute
mode the seconds and bytes of one microbatch on one rank, and the types that make them so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd, prod

from ..costmodel.cluster import Cluster
from ..costmodel.liveness import BlockBytes, block_bytes
from ..costmodel.precision import Precision
from ..costmodel.shards import local_shape
from ..ir.graph import Binding, Graph, Model, Op
from ..ir.mesh import Axis, Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, OpTypes, Recompute
from ..ir.types import AxisType, NdType
from .costs import ModelCosts
from .linear_program import Solver
from .sbp_program import Chain, Typing, solve
from .signatures import NdSignature, is_view

MODES: tuple[Recompute, ...] = ("none", "selective", "full")
MEMORY_PREFERENCE = 0.11
"""A program that keeps whole copies of parameters on every tensor rank is taken only where it is
faster by more than this: the median error of the best published cost model on public runs is 11 %
(SimuMax, 270 dense A100 runs), and bytes saved are certain."""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One call of a block for one microbatch on one rank."""

    seconds: float
    memory: BlockBytes


@dataclass(frozen=True, slots=True)
class Inner:
    """The solved inside of all blocks on one tensor mesh.

    `annotations` are on the tensor axes only. `bound_seconds` is the least any typing takes for a
    microbatch through the whole model. `local_parameters` are a rank's elements of each parameter
    of a block (after tensor parallelism), `carried_bytes` what a block hands to the next.
    """

    axes: tuple[Axis, ...]
    annotations: Mapping[str, Annotation]
    costs: Mapping[tuple[str, Recompute], BlockCost]
    bound_seconds: float
    method: str
    local_parameters: Mapping[str, tuple[int, ...]]
    carried_bytes: Mapping[str, int]


def sub_axes(model: Model, tp: int) -> tuple[int, ...]:
    """Sizes of the sub-axes of tp.

    One, unless a head-like factor (of an attention) shares only a part of tp: on 2 key-value heads
    tp=4 is 2×2, so that one half splits them and the other splits the queries of each.
    """
    sizes = {tp}
    for graph in model.blocks.values():
        for op in graph.ops:
            if TABLE[op.kind].work == "attention":
                heads = [op.sizes[f] for f in op.rule.operands[1][1]]
                count = prod(size for size in heads if isinstance(size, int))
                if tp % count == 0 or gcd(tp, count) > 1:
                    sizes.add(gcd(tp, count))
    chain = sorted(sizes)
    if any(big % small for small, big in pairwise(chain)):
        return (tp,)
    found, done = [], 1
    for size in chain:
        if size > done:
            found.append(size // done)
            done = size
    return tuple(found) or (1,)


def solve_inner(
    model: Model,
    chain: Chain,
    cluster: Cluster,
    mesh: Mesh,
    binding: Binding,
    precision: Precision,
    modes: Sequence[Recompute] = MODES,
    solver: Solver = "highs",
    decided_on: Cluster | None = None,
) -> Inner:
    """Types every block on the tensor axes of `mesh` and prices it in every recompute mode.

    Two programs are solved: one for time alone, whose objective is the bound, and one in which
    bytes of parameter state cost what recomputation would pay for them. Raises Infeasible where
    pins cannot hold. `decided_on` is the cluster whose prices choose the types, where that is not
    the one whose prices are reported.
    """
    axes = tuple(axis for axis in mesh.axes if axis.parent == "tp")
    values = {name: graph.values for name, graph in model.blocks.items()}
    plain = ModelCosts(decided_on or cluster, mesh, axes, binding, precision, values=values)
    divisible = {**binding, "b": 1}  # sequences are split by the data-parallel axis alone
    fastest = solve(chain, axes, divisible, plain, solver)
    chosen = fastest
    if prod(axis.size for axis in axes) > 1:
        state = precision.compute_bytes + precision.gradient_bytes + precision.optimizer_bytes
        price = _recompute_rate(chain, fastest, plain, mesh, binding, precision)
        thrifty_costs = replace(
            plain, memory_price_s_per_byte=price, state_bytes=state, _ops={}, _moves={}
        )
        thrifty = solve(chain, axes, divisible, thrifty_costs, solver)
        seconds = sum(evaluate(chain, thrifty.annotations, plain).values())
        if seconds <= fastest.objective * (1 + MEMORY_PREFERENCE):
            chosen = thrifty
    costs: dict[tuple[str, Recompute], BlockCost] = {}
    bound = fastest.objective
    if decided_on is not None:
        plain = replace(plain, cluster=cluster, _ops={}, _moves={}, _collectives={})
        bound = sum(evaluate(chain, chosen.annotations, plain).values())
    for mode in modes:
        pricing = replace(plain, recompute=mode, _ops={}, _moves={})
        seconds_of = evaluate(chain, chosen.annotations, pricing)
        for block, graph in chain.blocks.items():
            types = chosen.annotations[block]
            memory = block_bytes(graph, types, mesh, binding, precision, mode)
            costs[block, mode] = BlockCost(seconds_of[block] / chain.counts[block], memory)
    blocks = chain.blocks.items()
    return Inner(
        axes,
        chosen.annotations,
        costs,
        bound,
        chosen.method if chosen.method == fastest.method else "mip",
        {b: _local_parameters(g, chosen.annotations[b], mesh, binding) for b, g in blocks},
        {b: _carried_bytes(chain, b, chosen.annotations[b], mesh, binding, precision)
         for b, _ in blocks},
    )  # fmt: skip


def evaluate(
    chain: Chain, annotations: Mapping[str, Annotation], costs: ModelCosts
) -> dict[str, float]:
    """Seconds of all occurrences of each block, added up from the annotations alone."""
    found: dict[str, float] = {}
    for block, graph in chain.blocks.items():
        types = annotations[block]
        total = 0.0
        for op in graph.ops:
            if not is_view(op):
                total += costs.op(block, op, signature_of(op, types.ops[op.name], costs.axes))
        made = types.produced(graph)
        free = chain.free.get(block, frozenset())
        for name, kinds in types.needed(graph).items():
            if name in free:
                continue
            for kind in kinds:
                total += costs.conversion(block, graph.values[name], made[name], kind)
        found[block] = total * chain.counts[block]
    return found


def signature_of(op: Op, types: OpTypes, axes: Sequence[Axis]) -> NdSignature:
    """The signature that an annotation means: the loop each axis splits, read off the types."""
    shapes = op.rule.operands + op.rule.results
    factors: list[str | None] = []
    for axis in axes:
        split = None
        for shape, nd in zip(shapes, types.operands + types.results, strict=True):
            kind = nd[axis.name]
            if kind.is_split:
                split = shape[kind.dim][kind.part]
                break
        factors.append(split)
    return NdSignature(types.operands, types.results, tuple(factors))


def with_data_axis(tensor: Annotation, data: Annotation) -> Annotation:
    """Types on (dp, tensor axes) from those on each: dp is the outermost."""

    def join(a: NdType, b: NdType) -> NdType:
        return NdType(a.axes + b.axes)

    def joined(a: tuple[NdType, ...], b: tuple[NdType, ...]) -> tuple[NdType, ...]:
        return tuple(join(x, y) for x, y in zip(a, b, strict=True))

    ops = {
        name: OpTypes(
            joined(types.operands, tensor.ops[name].operands),
            joined(types.results, tensor.ops[name].results),
        )
        for name, types in data.ops.items()
    }
    return Annotation(
        joined(data.inputs, tensor.inputs),
        joined(data.parameters, tensor.parameters),
        ops,
        joined(data.outputs, tensor.outputs),
    )


def replicated(graph: Graph, axes: Sequence[str], kind: AxisType) -> Annotation:
    """An annotation in which every value has the same type on every axis."""
    whole = NdType.uniform(tuple(axes), kind)
    ops = {
        op.name: OpTypes((whole,) * len(op.operands), (whole,) * len(op.results))
        for op in graph.ops
    }
    return Annotation(
        (whole,) * len(graph.inputs), (whole,) * len(graph.parameters), ops,
        (whole,) * len(graph.outputs),
    )  # fmt: skip


def _local_parameters(
    graph: Graph, types: Annotation, mesh: Mesh, binding: Binding
) -> tuple[int, ...]:
    return tuple(
        prod(local_shape(graph.values[name], kind, mesh, binding))
        for name, kind in zip(graph.parameters, types.parameters, strict=True)
    )


def _carried_bytes(
    chain: Chain,
    block: str,
    types: Annotation,
    mesh: Mesh,
    binding: Binding,
    precision: Precision,
) -> int:
    """Bytes a rank sends when a pipeline is cut after a block."""
    graph = chain.blocks[block]
    losses = chain.losses.get(block, frozenset())
    return sum(
        prod(local_shape(graph.values[name], kind, mesh, binding))
        * precision.element_bytes(graph.values[name].dtype)
        for name, kind in zip(graph.outputs, types.outputs, strict=True)
        if name not in losses
    )


def _recompute_rate(
    chain: Chain,
    fastest: Typing,
    plain: ModelCosts,
    mesh: Mesh,
    binding: Binding,
    precision: Precision,
) -> float:
    """Seconds per byte at which full recomputation buys activation memory, over all blocks."""
    seconds = saved = 0.0
    slow = replace(plain, recompute="full", _ops={}, _moves={})
    before = evaluate(chain, fastest.annotations, plain)
    after = evaluate(chain, fastest.annotations, slow)
    for block, graph in chain.blocks.items():
        types, count = fastest.annotations[block], chain.counts[block]
        none = block_bytes(graph, types, mesh, binding, precision, "none")
        full = block_bytes(graph, types, mesh, binding, precision, "full")
        seconds += after[block] - before[block]
        saved += count * max(0, none.kept - full.kept)
    return seconds / saved if saved else 0.0
