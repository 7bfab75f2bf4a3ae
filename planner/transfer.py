"""The same plan at another size: types carried over op by op to a model of the same structure.

`verify` runs plans scaled down: fewer layers, smaller dims, axes of size 2. What is to be checked
is the program that was planned, so its types are kept, not planned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..ir import InvalidInput
from ..ir.from_dims import expert_binding
from ..ir.graph import Binding, Graph, Model, bind
from ..ir.mesh import Axis, Mesh
from ..ir.plan import Annotation, Plan, Recompute, Stage
from .build import full_annotations, preamble_annotation
from .request import bounds_of, repeated


def scaled_plan(
    plan: Plan, model: Model, sizes: Mapping[str, int], global_batch: int, seq_len: int
) -> Plan:
    """`plan` for `model`, whose blocks have the same ops, on axes of the given sizes.

    `sizes` maps `pp`, `dp` and tensor axes to their new sizes (1 stays 1). Stages keep their
    recompute modes in turn. Raises InvalidInput where the model differs in structure or a split
    does not divide the smaller sizes.
    """
    mesh = Mesh(tuple(Axis(a.name, sizes.get(a.name, a.size), a.parent) for a in plan.mesh.axes))
    binding = expert_binding(model, {"b": plan.strategy.micro_batch, "s": seq_len})
    tensor: dict[str, Annotation] = {}
    for block, graph in model.blocks.items():
        if block not in plan.model.blocks:
            raise InvalidInput(f"block {block}: the plan has {', '.join(plan.model.blocks)}")
        _same_structure(block, plan.model.blocks[block], graph)
        tensor[block] = plan.annotations[block].on(plan.tensor_axes)
        _check_division(block, graph, tensor[block], mesh, binding)
    pp = mesh["pp"].size
    strategy = replace(
        plan.strategy,
        pp=pp,
        dp=mesh["dp"].size,
        tp=mesh.size // (pp * mesh["dp"].size),
        micro_batch=binding["b"],
    )
    stages = _stages(plan, model, pp * plan.strategy.vpp)
    counts = repeated(model).per_stage([0, *(stage.last for stage in stages)])
    workload: dict[str, Any] = {
        **plan.workload, "global_batch": global_batch, "seq_len": seq_len,
    }  # fmt: skip
    return replace(
        plan,
        model=model,
        strategy=replace(strategy, layers=counts),
        mesh=mesh,
        annotations=full_annotations(model, tensor),
        preamble=preamble_annotation(model, mesh),
        stages=stages,
        workload=workload,
    )


def _same_structure(block: str, planned: Graph, small: Graph) -> None:
    if [(op.name, op.kind) for op in planned.ops] != [(op.name, op.kind) for op in small.ops]:
        raise InvalidInput(f"block {block}: the model's ops are not those of the plan")


def _check_division(
    block: str, graph: Graph, types: Annotation, mesh: Mesh, binding: Binding
) -> None:
    for name, kind in types.produced(graph).items():
        ways: dict[tuple[int, int], int] = {}
        for axis, along in kind:
            if along.is_split:
                place = (along.dim, along.part)
                ways[place] = ways.get(place, 1) * mesh[axis].size
        for (dim, part), count in ways.items():
            size = bind(graph.values[name].dims[dim][part], binding)
            if size % count:
                raise InvalidInput(
                    f"{name} of {block}: {size} does not divide by {count} at this size"
                )


def _stages(plan: Plan, model: Model, pp: int) -> tuple[Stage, ...]:
    """The model's segments over `pp` (virtual) stages, evenly, with the plan's recompute modes in
    turn."""
    layers = repeated(model)
    share, extra = divmod(layers.count, pp)
    bounds = bounds_of(model, tuple(share + (s < extra) for s in range(pp)))
    stages = []
    for s in range(pp):
        source = plan.stages[min(s * len(plan.stages) // pp, len(plan.stages) - 1)]
        wanted: list[Recompute] = [m for m in dict.fromkeys(source.recompute) if m != "none"]
        cycle: list[Recompute] = wanted or ["none"]
        if wanted and "none" in source.recompute[1:-1]:
            cycle.append("none")
        modes: list[Recompute] = []
        for i in range(bounds[s], bounds[s + 1]):
            modes.append(cycle[len(modes) % len(cycle)] if i in layers else "none")
        stages.append(Stage(bounds[s], bounds[s + 1], tuple(modes)))
    return tuple(stages)
