"""From an outcome of the search to a `Plan`: types on every axis, stages, figures, runners-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import isfinite
from typing import Any

from ..costmodel.cluster import Cluster
from ..costmodel.yaml_files import validated
from ..ir import InvalidInput
from ..ir.graph import Graph, Model
from ..ir.mesh import Mesh
from ..ir.plan import (
    Alternative,
    Annotation,
    Certificate,
    Plan,
    Predicted,
    Recompute,
    Stage,
    Strategy,
    data_parallel_types,
)
from ..ir.types import R
from ..ir.workload import Workload
from .candidates import emits, unemittable
from .inner import MODES, replicated, with_data_axis
from .leave_out import advice_on
from .model_changes import described
from .report import GIB
from .request import Request, repeated
from .search import Found, Search
from .solving import Outcome


def build_plan(search: Search, found: Found, asked_for: Cluster | None = None) -> Plan:
    """The plan of the best outcome; the others become its alternatives. `asked_for`: the cluster
    that was to be planned for, where the plan is to say what of it would be better left out."""
    request, best = search.request, found.outcomes[0]
    model, mesh = request.model, search.solving.mesh(best.candidate)
    return Plan(
        model=model,
        strategy=strategy_of(request, best),
        mesh=mesh,
        annotations=full_annotations(model, best.inner.annotations),
        preamble=preamble_annotation(model, mesh),
        stages=tuple(
            Stage(first, last, modes)
            for (first, last), modes in zip(pairwise(best.cut.bounds), best.cut.modes, strict=True)
        ),
        workload=request.workload.model_dump(),
        cluster=describe(request),
        predicted=predicted(request, best),
        certificate=_certificate(found),
        alternatives=tuple(_alternative(request, found, other) for other in found.outcomes[1:]),
        mapping=best.mapping,
        advice=tuple(_advice(search, found, asked_for)),
    )


def _advice(search: Search, found: Found, asked_for: Cluster | None) -> Iterator[str]:
    request, best = search.request, found.outcomes[0]
    yield from _limits(request, best)
    if found.interrupted:
        yield (
            f"the search was interrupted: the best of {found.solved} configurations solved, "
            f"{found.pruned} were still open"
        )
    if asked_for is None:
        return
    used = (request.hardware or request.cluster).nodes
    if used < asked_for.nodes:
        least = "costs" if found.spending.objective == "cost" else "takes"
        what = "" if least == "costs" else " energy"
        yield f"uses {used} of {asked_for.nodes} nodes, on which a step {least} the least{what}"
    elif not found.interrupted and found.spending.objective == "time":
        yield from advice_on(request, best, search.anything)


def _certificate(found: Found) -> Certificate:
    best, spending = found.outcomes[0], found.spending
    spent = found.spent(best)
    bound = min(found.bound, spent)
    gap = max(0.0, 1 - bound / spent)
    return Certificate(
        best.seconds * (1 - gap), gap, found.solved, found.pruned, found.infeasible,
        found.seconds, found.methods, spending.objective, spent, bound, spending.unit,
    )  # fmt: skip


def _limits(request: Request, best: Outcome) -> Iterator[str]:
    """What of the plan no backend emits yet, in a line, and what it needs beside its devices."""
    emitted = emits(request.model)
    reason = unemittable(strategy_of(request, best)) if emitted else "mixtures of experts"
    if reason:
        yield f"cannot be emitted yet: {reason}"
    if changes := "; ".join(described(best.candidate)):
        yield f"changes the model: {changes}"
    if most := max(stage.host for stage in best.memory):
        yield f"up to {most / GIB:.1f} GiB of activations for each device wait in host memory"


def full_annotations(model: Model, tensor: Mapping[str, Annotation]) -> dict[str, Annotation]:
    """Types on (dp, tensor axes) of every block, from those on the tensor axes."""
    return {
        block: with_data_axis(tensor[block], _data_types(graph))
        for block, graph in model.blocks.items()
    }


def _data_types(graph: Graph) -> Annotation:
    """Types along dp; whole where a block mixes sequences (it is then planned on dp=1 only)."""
    try:
        return data_parallel_types(graph)
    except InvalidInput:
        return replicated(graph, ("dp",), R)


def preamble_annotation(model: Model, mesh: Mesh) -> Annotation:
    """The preamble is computed whole on every tensor rank, for the rank's own sequences."""
    axes = [axis.name for axis in mesh.axes if axis.parent == "tp"]
    return with_data_axis(replicated(model.preamble, axes, R), data_parallel_types(model.preamble))


def strategy_of(request: Request, outcome: Outcome) -> Strategy:
    """The strategy in the names scripts rely on; `recompute` is the strongest mode in use."""
    used: set[Recompute] = {mode for stage in outcome.cut.modes for mode in stage}
    layers = repeated(request.model).per_stage(outcome.cut.bounds)
    return outcome.candidate.strategy(max(used, key=MODES.index), layers, request.fix.sp)


def predicted(request: Request, outcome: Outcome) -> Predicted:
    """The cost model's figures for an outcome."""
    workload = request.workload
    tokens = workload.global_batch * workload.seq_len
    limits = tuple(int(inner.cluster.device.memory_limit_bytes) for inner in outcome.inners)
    mfu = request.flops_per_step() / (outcome.seconds * request.peak_flops_per_s)
    return Predicted(
        outcome.seconds,
        tokens / outcome.seconds,
        mfu,
        tuple(stage.total for stage in outcome.memory),
        request.limit_bytes,
        dict(outcome.time),
        tuple(stage.to_json() for stage in outcome.memory),
        limits if len(set(limits)) > 1 else (),
    )


def describe(request: Request) -> dict[str, Any]:
    """The cluster as the plan file keeps it."""
    return dict((request.hardware or request.cluster).model_dump(mode="json"))


def check_described(plan: Plan) -> None:
    """Raises InvalidInput where a plan that was read does not say what it was made for, or what was
    predicted of it."""
    validated(Cluster, plan.cluster, "cluster")
    Workload(**plan.workload)
    if missing := Workload.model_fields.keys() - plan.workload.keys():
        raise InvalidInput(f"workload.{min(missing)} is missing")
    said = plan.predicted
    if len(said.memory_bytes) != plan.strategy.pp:
        raise InvalidInput(
            f"predicted.memory_bytes has {len(said.memory_bytes)} items, expected one for each of "
            f"{plan.strategy.pp} pipeline ranks"
        )
    for name in ("step_seconds", "memory_limit_bytes"):
        number = getattr(said, name)
        if not (isfinite(number) and number > 0):
            raise InvalidInput(f"predicted.{name} is {number}: a number above 0")


_AS_GOOD = 0.0005
"""Of what a step spends: less is no difference."""


def _alternative(request: Request, found: Found, other: Outcome) -> Alternative:
    best = found.outcomes[0]
    more = found.spent(other) / found.spent(best) - 1
    parts = Counter({key: other.time.get(key, 0.0) - best.time.get(key, 0.0)
                     for key in {*best.time, *other.time}})  # fmt: skip
    worst, lost = parts.most_common(1)[0]
    name = {"time": "slower", "cost": "dearer", "energy": "more energy"}[found.spending.objective]
    if abs(more) < _AS_GOOD or more < 0:
        reason = "as good, but communicates more or has less memory to spare"
    else:
        reason = f"{more:.1%} {name}"
    if lost > _AS_GOOD * best.seconds:
        reason += f", most of it in {worst.replace('_', ' ')} (+{lost:.3g} s)"
    fullest = max(stage.total for stage in other.memory)
    if fullest < max(stage.total for stage in best.memory) * 0.9:
        reason += f"; needs only {fullest / GIB:.0f} GiB"
    if limits := unemittable(other.candidate):
        reason += f"; cannot be emitted yet: {limits}"
    return Alternative(strategy_of(request, other), other.seconds, fullest, reason, other.time)
