"""Whether the parts of a plan fit each other: types, ops, mesh, stages.

`Model.check` says whether the graph is well formed; this says whether its annotation is. A plan
that passes can be emitted: every op runs in types that its rule allows along every mesh axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from .errors import InvalidInput
from .graph import Dims, Graph, Op, Value
from .plan import Annotation, OpTypes, Plan
from .signature import signatures
from .types import NdType


def check_plan(plan: Plan) -> None:
    """Raises InvalidInput, naming the place, where a plan contradicts itself."""
    _check_mesh(plan)
    _check_stages(plan)
    if plan.annotations.keys() != plan.model.blocks.keys():
        differ = min(plan.annotations.keys() ^ plan.model.blocks.keys())
        raise InvalidInput(f"block {differ!r}: the model's blocks and the annotations differ")
    sizes = {name: plan.mesh[name].size for name in plan.type_axes}
    for name, graph in plan.model.blocks.items():
        _check_annotation(f"annotations of block {name!r}", graph, plan.annotations[name], sizes)
    _check_annotation("annotations of the preamble", plan.model.preamble, plan.preamble, sizes)


def _check_mesh(plan: Plan) -> None:
    strategy, mesh = plan.strategy, plan.mesh
    if len(set(mesh.names)) < len(mesh.names):
        raise InvalidInput(f"mesh: an axis appears twice in {', '.join(mesh.names)}")
    for name in ("pp", "dp", "tp"):
        degree = getattr(strategy, name)
        have = prod(axis.size for axis in mesh.axes if axis.parent == name)
        if degree != have:
            raise InvalidInput(f"strategy.{name} is {degree}, but the mesh has {have} of it")
    for name in ("micro_batch", "vpp", "cp", "ep"):
        if getattr(strategy, name) < 1:
            raise InvalidInput(f"strategy.{name} is {getattr(strategy, name)}: at least 1")
    if not 0 <= strategy.zero <= 3:
        raise InvalidInput(f"strategy.zero is {strategy.zero}: 0 to 3")
    for name in ("global_batch", "seq_len"):
        if type(plan.workload.get(name)) is not int or plan.workload[name] < 1:
            raise InvalidInput(f"workload.{name} is {plan.workload.get(name)!r}: a number above 0")
    if plan.workload["global_batch"] % (strategy.dp * strategy.micro_batch):
        raise InvalidInput(
            f"workload.global_batch {plan.workload['global_batch']} is no multiple of "
            f"dp {strategy.dp} × micro_batch {strategy.micro_batch}"
        )


def _check_stages(plan: Plan) -> None:
    if len(plan.stages) != plan.strategy.pp * plan.strategy.vpp:
        raise InvalidInput(f"{len(plan.stages)} stages, the strategy has {plan.strategy.pp}")
    first = 0
    for i, stage in enumerate(plan.stages):
        if stage.first != first or stage.last < stage.first:
            raise InvalidInput(
                f"stages[{i}] runs segments {stage.first} to {stage.last}, expected to start at "
                f"{first}"
            )
        if len(stage.recompute) != stage.last - stage.first:
            raise InvalidInput(f"stages[{i}]: one recompute mode per segment is expected")
        first = stage.last
    if first != len(plan.model.segments):
        raise InvalidInput(f"stages end at segment {first} of {len(plan.model.segments)}")


def _check_annotation(
    where: str, graph: Graph, annotation: Annotation, sizes: Mapping[str, int]
) -> None:
    if annotation.ops.keys() != {op.name for op in graph.ops}:
        differ = min(annotation.ops.keys() ^ {op.name for op in graph.ops})
        raise InvalidInput(f"{where}: op {differ!r} is in only one of graph and annotation")
    sides: list[tuple[str, Sequence[str], Sequence[NdType]]] = [
        ("inputs", graph.inputs, annotation.inputs),
        ("parameters", graph.parameters, annotation.parameters),
        ("outputs", graph.outputs, annotation.outputs),
    ]
    for op in graph.ops:
        types = annotation.ops[op.name]
        sides += [(f"op {op.name!r} reads", op.operands, types.operands)]
        sides += [(f"op {op.name!r} makes", op.results, types.results)]
    for what, names, nd_types in sides:
        if len(names) != len(nd_types):
            raise InvalidInput(f"{where}: {what}: {len(nd_types)} types for {len(names)} values")
        for name, nd_type in zip(names, nd_types, strict=True):
            if problem := _misfit(graph.values[name].dims, nd_type, sizes):
                raise InvalidInput(f"{where}: {what} {name!r} as {nd_type}: {problem}")
    for op in graph.ops:
        types = annotation.ops[op.name]
        for axis in illegal_axes(op, types, graph.values, list(sizes)):
            raise InvalidInput(
                f"{where}: op {op.name!r} ({op.kind}) runs {_along(types, axis)} along {axis!r}, "
                f"which its rule {op.rule} does not allow"
            )


def illegal_axes(
    op: Op, types: OpTypes, values: Mapping[str, Value], axes: Iterable[str]
) -> Iterator[str]:
    """Those of the axes along which the types of an op are none of its signatures."""
    legal = {(s.operands, s.results) for s in signatures(op, values)}
    for axis in axes:
        along = (
            tuple(t[axis] for t in types.operands),
            tuple(t[axis] for t in types.results),
        )
        if along not in legal:
            yield axis


def _along(types: OpTypes, axis: str) -> str:
    left = ", ".join(str(t[axis]) for t in types.operands)
    return f"{left} -> {', '.join(str(t[axis]) for t in types.results)}"


def _misfit(dims: Dims, nd_type: NdType, sizes: Mapping[str, int]) -> str:
    """What is wrong with a type of a value with these dims on this mesh; empty if nothing is."""
    axes = tuple(axis for axis, _ in nd_type)
    expected = tuple(sizes)
    if axes != expected:
        return f"expected the axes {', '.join(expected)} in this order"
    split: dict[tuple[int, int], int] = {}
    for axis, kind in nd_type:
        if kind.is_split:
            if kind.dim >= len(dims) or kind.part >= len(dims[kind.dim]):
                return f"its dims {dims} have no factor {kind}"
            at = kind.dim, kind.part
            split[at] = split.get(at, 1) * sizes[axis]
            size = dims[kind.dim][kind.part]
            if isinstance(size, int) and size % split[at]:
                return f"a factor of {size} does not split {split[at]} ways"
    return ""
