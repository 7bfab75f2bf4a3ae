"""What a plan's types say is moved in a training step: collectives by kind, and their bytes.

One collective for every step of a conversion that is not local and one for its dual in the backward
pass, for every microbatch; then what ZeRO does with parameters and gradients along dp, and a few
sums of single numbers. What is done to a parameter alone, outside of a scan over layers, is the
same in every microbatch and happens once. Bytes are of a collective's result on one device, at four
bytes an element. JAX takes no one's word that copies are equal: R→I and the gradient of I→P are
all-reduces there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from shardwright.backends.emission.target import Target
from shardwright.ir.conversion import LOCAL, Collective, Step, steps
from shardwright.ir.graph import Graph, Segment, Value
from shardwright.ir.optable import TABLE
from shardwright.ir.plan import Annotation, Plan
from shardwright.ir.types import NdType

WIDTH = 4


@dataclass(slots=True)
class Moved:
    """Collectives of one step on one device."""

    count: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: Collective, elements: int, times: int = 1) -> None:
        """`times` collectives with results of so many elements; local steps are none."""
        if kind not in LOCAL and times:
            name = kind.replace("_", "-")
            self.count[name] += times
            self.bytes[name] += times * elements * WIDTH


def planned(plan: Plan, arrays: Sequence[Sequence[str]], update: bool = True) -> Moved:
    """Of a whole training step, or of its loss and gradients alone; `arrays` names the parameters
    that each array of the program holds."""
    moved = Moved()
    scanned = {name for names in arrays if len(names) > 1 for name in names}
    multiplied: set[str] = set()
    for segment in plan.model.segments:
        graph, annotation = plan.model.blocks[segment.block], plan.annotations[segment.block]
        views = _views(graph, segment)
        once = {value for value, name in views.items() if name not in scanned}
        _conversions(moved, plan, graph, annotation, once)
        _losses(moved, plan, graph, annotation)
        multiplied |= {
            views[x]
            for op in graph.ops
            for x in op.operands
            if TABLE[op.kind].work == "contraction" and x in views
        }
    if any(kind.kind == "P" for _, kind in _loss_types(plan)):
        moved.add("all_reduce", 1, plan.microbatches)
    _data_parallel(moved, plan, arrays, multiplied, update)
    return moved


def _views(graph: Graph, segment: Segment) -> dict[str, str]:
    """Parameters of a block and views of them → the parameter's name in the model."""
    found = dict(zip(graph.parameters, segment.parameters, strict=True))
    for op in graph.ops:
        if TABLE[op.kind].work == "view" and op.operands and op.operands[0] in found:
            found |= dict.fromkeys(op.results, found[op.operands[0]])
    return found


def _loss_types(plan: Plan) -> NdType:
    """How the loss lies along the tensor axes; dp is summed after the last microbatch."""
    segment = plan.model.segments[-1]
    types = plan.annotations[segment.block].outputs[segment.outputs.index(plan.model.loss[0])]
    live = Target(plan.mesh).live(types)
    return NdType(tuple((axis, kind) for axis, kind in live if axis != "dp"))


def _elements(plan: Plan, value: Value, form: NdType) -> int:
    sizes = {"b": plan.strategy.micro_batch, "s": int(plan.workload["seq_len"])}
    local = Target(plan.mesh).local(value, form)
    return prod(
        size.number or sizes[size.symbol] * size.times // size.by for dim in local for size in dim
    )


def _conversions(
    moved: Moved, plan: Plan, graph: Graph, annotation: Annotation, once: set[str]
) -> None:
    target = Target(plan.mesh)
    made = annotation.produced(graph)
    for name, needs in annotation.needed(graph).items():
        if name not in made or name in plan.model.loss:
            continue
        value, seen = graph.values[name], set()
        for want in needs:
            form = target.live(made[name])
            for step in steps(form, target.live(want)):
                after = form.replace(step.axis, step.target)
                if after not in seen:
                    larger, smaller = (_elements(plan, value, each) for each in (after, form))
                    moved.add(_forward(step), larger, 1 if name in once else plan.microbatches)
                    if value.grad:
                        moved.add(_backward(step), smaller, plan.microbatches)
                form = after
                seen.add(form)


def _forward(step: Step) -> Collective:
    same = (step.source.kind, step.target.kind) == ("R", "I")
    return "all_reduce" if same else step.forward


def _backward(step: Step) -> Collective:
    same = (step.source.kind, step.target.kind) == ("I", "P")
    return "all_reduce" if same else step.backward


def _losses(moved: Moved, plan: Plan, graph: Graph, annotation: Annotation) -> None:
    """A cross-entropy over a split vocabulary: the maxima, and two sums in one."""
    for op in graph.ops:
        if op.kind != "cross_entropy":
            continue
        types = Target(plan.mesh).live(annotation.ops[op.name].operands[0])
        value = graph.values[op.operands[0]]
        for axis in types.splitting(len(value.dims) - 1):
            tokens = _elements(plan, value, types) // _last(plan, value, types)
            assert axis.startswith("tp")
            moved.add("all_reduce", tokens, plan.microbatches)
            moved.add("all_reduce", 2 * tokens, plan.microbatches)


def _last(plan: Plan, value: Value, types: NdType) -> int:
    return prod(size.number for size in Target(plan.mesh).local(value, types)[-1])


def _data_parallel(
    moved: Moved,
    plan: Plan,
    arrays: Sequence[Sequence[str]],
    multiplied: set[str],
    update: bool,
) -> None:
    dp, zero = plan.strategy.dp, plan.strategy.zero
    target, parameters = Target(plan.mesh), plan.model.parameters
    types = {name: target.live(kind) for name, kind in plan.parameter_types().items()}
    splits = set()
    for names in arrays:
        first = parameters[names[0]]
        split = {a for a, kind in types[names[0]] if kind.is_split and a != "dp"}
        local = prod(first.shape) // prod(target.size(a) for a in split)
        shares = dp > 1 and zero > 0 and local % dp == 0  # of these models: some dim divides
        splits.add(frozenset(split | ({"dp"} if shares else set())))
        if dp == 1:
            continue
        whole = local * len(names)
        if not shares:
            moved.add("all_reduce", whole)
        elif zero < 3:
            moved.add("reduce_scatter", whole // dp, plan.microbatches if zero == 2 else 1)
            moved.add("all_gather", whole, int(update))
        elif len(names) == 1:
            uses = sum(names[0] in segment.parameters for segment in plan.model.segments)
            moved.add("all_gather", local)
            moved.add("reduce_scatter", local // dp, plan.microbatches * uses)  # tied: each use
        else:  # layer by layer; the backward pass gathers again what products read
            times = plan.microbatches * len(names)
            moved.add("all_gather", local, times * (2 if names[0] in multiplied else 1))
            moved.add("reduce_scatter", local // dp, times)
    for split in splits:
        moved.add("all_reduce", 1, int(update and bool(split)))  # the gradients' norm
    if dp > 1:
        counted = any(
            op.kind == "cross_entropy" for g in plan.model.blocks.values() for op in g.ops
        )
        moved.add("all_reduce", 1, 1 + counted)  # the loss, and the number of its terms
