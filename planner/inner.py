"""The inside of blocks for one tensor-parallel mesh and micro-batch: solved once, priced per mode.

`Inner` is what the search over stages needs to know of a model: per distinct block and recompute
mode the seconds and bytes of one microbatch on one rank, and the types that make them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import gcd, prod

from ..costmodel.cluster import Cluster
from ..costmodel.device import Device
from ..costmodel.liveness import BlockBytes, block_bytes
from ..costmodel.offload import activations_exposed_seconds, can_offload
from ..costmodel.precision import Precision
from ..costmodel.shards import local_shape
from ..costmodel.work import Work
from ..ir.graph import Binding, Graph, Model, Op
from ..ir.mesh import Axis, Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, OpTypes, Recompute
from ..ir.types import AxisType, NdType
from .chain import Chain
from .costs import BlockWork, ModelCosts
from .linear_program import Solver
from .model_changes import follow_each_other, with_changes
from .sbp_program import SbpProgram, Typing
from .signatures import NdSignature, is_view

MODES: tuple[Recompute, ...] = ("none", "selective", "full", "offload")
"""From the one that keeps most on the device to the one that keeps nothing."""
MOST_EXPOSED = 0.05
"""Of the time of a layer: what offloading its activations may add for the search to look at it.
Where more of the transfers sticks out, bounds that see no bubble make it seem good everywhere and
the search solves eight times as many configurations, of which none was the best (Llama-3.1-405B on
16,384 H100, where it adds 10 %)."""
MEMORY_PREFERENCE = 0.11
"""A program that keeps whole copies of parameters on every tensor rank is taken only where it is
faster by more than this: the median error of the best published cost model on public runs is 11 %
(SimuMax, 270 dense A100 runs), and bytes saved are certain."""


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One call of a block for one microbatch on one rank, with the host's time in it.

    `backward` includes what is recomputed first; `weights_s` is the part of it that makes gradients
    of parameters, which nothing waits for before the optimizer.
    """

    forward: Work
    backward: Work
    weights_s: float
    memory: BlockBytes

    @property
    def seconds(self) -> float:
        """Seconds of both passes."""
        return self.forward.total_s + self.backward.total_s

    def least_seconds(self, plain: BlockCost, share: float) -> float:
        """The same with no more of it forward than a `share`, or than where all is kept (`plain`).

        Bounds of schedules take a share of the work to be forward at most. Offloading waits for its
        link in both passes alike and may exceed that; a step with shorter passes is no longer.
        """
        forward, backward = self.forward.total_s, self.backward.total_s
        return min(forward, max(plain.forward.total_s, backward * share / (1 - share))) + backward

    def offloaded(self, device: Device, memory: BlockBytes) -> BlockCost:
        """The same with what it keeps moved to host memory and back."""
        passes = []
        for work in (self.forward, self.backward):
            moved = activations_exposed_seconds(device, memory.offloaded, work.total_s)
            passes.append(Work({**work.seconds, "offload": moved}, work.calls, work.flops,
                               work.collectives) if moved else work)  # fmt: skip
        return BlockCost(passes[0], passes[1], self.weights_s, memory)


@dataclass(frozen=True, slots=True)
class Inner:
    """The solved inside of all blocks on one tensor mesh of a cluster, as far as one pipeline rank
    sees it.

    `annotations` are on the tensor axes only. `bound_seconds` is the least any typing takes for a
    microbatch through the whole model. `local_parameters` are a rank's elements of each parameter
    of a block (after tensor and expert parallelism), `carried_bytes` what a block hands to the
    next, `expert_parameters` names which of a block's parameters belong to experts.
    """

    axes: tuple[Axis, ...]
    cluster: Cluster
    annotations: Mapping[str, Annotation]
    costs: Mapping[tuple[str, Recompute], BlockCost]
    bound_seconds: float
    method: str
    local_parameters: Mapping[str, tuple[int, ...]]
    carried_bytes: Mapping[str, int]
    expert_parameters: Mapping[str, frozenset[str]]

    @property
    def modes(self) -> tuple[Recompute, ...]:
        """The recompute modes that blocks are priced in."""
        return tuple(dict.fromkeys(mode for _, mode in self.costs))

    def where_hidden(self, counts: Mapping[str, int]) -> Inner:
        """Without offloading where that adds more than `MOST_EXPOSED` to what `counts` calls of the
        blocks take."""
        if "offload" not in self.modes:
            return self

        def seconds(mode: Recompute) -> float:
            return sum(n * self.costs[block, mode].seconds for block, n in counts.items())

        plain, moved = seconds("none"), seconds("offload")
        if moved <= plain * (1 + MOST_EXPOSED):
            return self
        left = {key: cost for key, cost in self.costs.items() if key[1] != "offload"}
        return replace(self, costs=left)

    def parameters_of(self, graph: Graph, block: str) -> tuple[int, int]:
        """A rank's parameters in a block: of dense layers, and of experts."""
        inside, sizes = self.expert_parameters[block], self.local_parameters[block]
        experts = sum(n for name, n in zip(graph.parameters, sizes, strict=True) if name in inside)
        return sum(sizes) - experts, experts


def modes_for(fixed: str | None, device: Device, anything: bool) -> tuple[Recompute, ...]:
    """The recompute modes to choose from: the one that is fixed, or those that are emitted, and
    with `anything` offloading as well on devices that say how fast and large their host memory
    is."""
    if fixed is not None:
        return tuple(mode for mode in MODES if mode == fixed)
    offloads = anything and can_offload(device)
    return tuple(mode for mode in MODES if mode != "offload" or offloads)


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


def chosen_types(
    chain: Chain, costs: ModelCosts, solver: Solver = "highs"
) -> tuple[Mapping[str, Annotation], float, str]:
    """The types of all blocks, the least seconds any types take, and how the program was solved.

    One program under two prices: time alone, whose objective is the bound, and, unless that keeps
    as few bytes of parameters as can be anyway, bytes of parameter state at what recomputation
    would pay for them.
    """
    # Idle time around collectives is the same for every layout of a kind of block but for how many
    # there are; that should not outweigh the memory a split saves, so the programs do not see it.
    seen = costs.runtime.model_copy(update={"collective_gap_s": 0.0})
    plain = replace(costs, runtime=seen, candidate=None)
    precision, mesh, binding = plain.precision, plain.mesh, plain.binding
    divisible = {**binding, "b": 1}  # sequences are split by the data-parallel axis alone
    program = SbpProgram(chain, plain.axes, divisible, plain)
    fastest = program.solve(plain.storage, solver)
    chosen = fastest
    state = precision.compute_bytes + precision.gradient_bytes + precision.optimizer_bytes
    kept_bytes = plain.variant(memory_price_s_per_byte=1.0, state_bytes=state)
    if not program.keeps_least(fastest, kept_bytes.storage):
        price = _recompute_rate(chain, fastest, plain, mesh, binding, precision)
        priced = kept_bytes.variant(memory_price_s_per_byte=price)
        thrifty = program.solve(priced.storage, solver)
        seconds = sum(evaluate(chain, thrifty.annotations, plain).values())
        if seconds <= fastest.objective * (1 + MEMORY_PREFERENCE):
            chosen = thrifty
    method = chosen.method if chosen.method == fastest.method else "mip"
    return chosen.annotations, fastest.objective, method


def inner_of(
    chain: Chain,
    annotations: Mapping[str, Annotation],
    costs: ModelCosts,
    modes: Sequence[Recompute] = MODES,
    bound_seconds: float | None = None,
    method: str = "given",
) -> Inner:
    """Blocks under given types, priced; the bound, unless given, is what these types take."""
    mesh, binding, blocks = costs.mesh, costs.binding, chain.blocks.items()
    if bound_seconds is None:
        bound_seconds = sum(evaluate(chain, annotations, costs).values())
    return Inner(
        costs.axes,
        costs.cluster,
        annotations,
        price_blocks(chain, annotations, costs, modes),
        bound_seconds,
        method,
        {b: _local_parameters(b, annotations[b], costs) for b, _ in blocks},
        {b: _carried_bytes(chain, b, annotations[b], mesh, binding, costs.precision)
         for b, _ in blocks},
        {b: costs.expert_part(b).parameters for b, _ in blocks},
    )  # fmt: skip


def splits_anything(axes: Sequence[Axis], annotations: Mapping[str, Annotation]) -> bool:
    """Whether every tensor axis splits the result of some op."""
    return all(
        any(
            kind[axis.name].is_split
            for types in annotations.values()
            for op in types.ops.values()
            for kind in op.results
        )
        for axis in axes
    )


def price_blocks(
    chain: Chain,
    annotations: Mapping[str, Annotation],
    costs: ModelCosts,
    modes: Sequence[Recompute] = MODES,
) -> dict[tuple[str, Recompute], BlockCost]:
    """Time and memory of one call of every block in every recompute mode, under given types.
    Offloading is priced beside `none`, which has to be among `modes`."""
    found: dict[tuple[str, Recompute], BlockCost] = {}
    measured = costs.cluster.device.host_s_per_call
    layers = {block for block, graph in chain.blocks.items() if follow_each_other(graph)}
    for mode in sorted(modes, key=MODES.index):
        pricing = costs.variant(recompute=mode)
        if mode == "offload":
            for block in chain.blocks:
                memory = pricing.memory(block, annotations[block])
                plain = found[block, "none"]
                found[block, mode] = plain.offloaded(costs.cluster.device, memory)
            continue
        for block in chain.blocks:
            passes = pricing.block(
                block, annotations[block], partial(block_work, chain, block, costs=pricing)
            )
            backward = Work()
            backward.add(passes.backward)
            backward.add(passes.again)
            if mode != "none":
                backward.calls += costs.runtime.calls_per_checkpoint
            memory = pricing.memory(block, annotations[block])
            forward = passes.forward
            if block in layers:
                forward = with_changes(forward, costs.candidate, costs.runtime)
                backward = with_changes(backward, costs.candidate, costs.runtime)
            found[block, mode] = BlockCost(
                forward.with_overlap(costs.runtime).with_host(costs.runtime, measured),
                backward.with_overlap(costs.runtime).with_host(costs.runtime, measured),
                passes.weights_s,
                memory,
            )
    return found


def block_work(chain: Chain, block: str, types: Annotation, costs: ModelCosts) -> BlockWork:
    """Adds up one call of a block from its annotation alone."""
    graph, total = chain.blocks[block], BlockWork()
    again = costs.recompute == "full"
    for op in graph.ops:
        if TABLE[op.kind].work == "view":  # nothing for the device, a call for the host
            total.forward.calls += 1
            total.again.calls += again
            total.backward.calls += any(graph.values[name].grad for name in op.results)
        if not is_view(op):
            work = costs.op_work(block, op, signature_of(op, types.ops[op.name], costs.axes))
            total.forward.add(work.forward)
            total.again.add(work.again)
            total.backward.add(work.backward)
            if TABLE[op.kind].work == "contraction":
                wanted = [graph.values[name] for name in op.operands if graph.values[name].grad]
                weights = sum(value.role == "parameter" for value in wanted)
                total.weights_s += work.backward.total_s * weights / max(1, len(wanted))
    for name, source, target in conversions(chain, block, types):
        moves = costs.conversion_work(block, graph.values[name], source, target)
        total.forward.add(moves.forward)
        total.again.add(moves.again)
        total.backward.add(moves.backward)
    return total


def conversions(
    chain: Chain, block: str, types: Annotation
) -> Iterator[tuple[str, NdType, NdType]]:
    """The conversions of a block that cost something: value, type it is made in, type needed."""
    graph = chain.blocks[block]
    made = types.produced(graph)
    free = chain.free.get(block, frozenset())
    for name, kinds in types.needed(graph).items():
        if name not in free:
            for kind in kinds:
                if kind != made[name]:
                    yield name, made[name], kind


def evaluate(
    chain: Chain, annotations: Mapping[str, Annotation], costs: ModelCosts
) -> dict[str, float]:
    """What the program minimises, for all occurrences of each block, from the annotations alone."""
    found: dict[str, float] = {}
    for block, graph in chain.blocks.items():
        types = annotations[block]
        total = 0.0
        for op in graph.ops:
            if not is_view(op):
                total += costs.op(block, op, signature_of(op, types.ops[op.name], costs.axes))
        for name, source, target in conversions(chain, block, types):
            total += costs.conversion(block, graph.values[name], source, target)
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


def _local_parameters(block: str, types: Annotation, costs: ModelCosts) -> tuple[int, ...]:
    graph, candidate = costs.graphs[block], costs.candidate
    experts = costs.expert_part(block).parameters if candidate is not None else frozenset()
    found = []
    for name, kind in zip(graph.parameters, types.parameters, strict=True):
        value = graph.values[name]
        if candidate is not None and name in experts:
            found.append(-(-prod(value.shape({})) // (candidate.ep * candidate.etp)))
        else:
            found.append(prod(local_shape(value, kind, costs.mesh, costs.binding)))
    return tuple(found)


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
    slow = plain.variant(recompute="full")
    before = evaluate(chain, fastest.annotations, plain)
    after = evaluate(chain, fastest.annotations, slow)
    for block, graph in chain.blocks.items():
        types, count = fastest.annotations[block], chain.counts[block]
        none = block_bytes(graph, types, mesh, binding, precision, "none")
        full = block_bytes(graph, types, mesh, binding, precision, "full")
        seconds += after[block] - before[block]
        saved += count * max(0, none.kept - full.kept)
    return seconds / saved if saved else 0.0
