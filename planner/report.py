"""Plans, predictions and replans in words, tables and JSON: what `print` and `--json` show."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..ir.graph import Graph
from ..ir.plan import Annotation, Plan
from ..ir.types import I, NdType, S

if TYPE_CHECKING:
    from .predict import Prediction
    from .replan import Replanned
    from .waiting import Waiting

GIB = 2**30
MIB = 2**20


def render(*parts: Table | str, width: int = 130) -> str:
    """Tables and lines as plain text."""
    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False, markup=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _count(number: int) -> str:
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.4g} ms"


def table(title: str, *columns: str) -> Table:
    """An empty table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", title_style="", header_style="", box=None)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return made


def summary(plan: Plan) -> str:
    """The plan on one screen: strategy, predicted figures, stages, layout of the parameters."""
    work, cluster, predicted = plan.workload, plan.cluster, plan.predicted
    head = (
        f"{plan.model.name}: {_count(plan.model.elements)} parameters on {cluster['nodes']} x "
        f"{cluster['devices_per_node']} {cluster['device']['name']}, global batch "
        f"{work['global_batch']} x {work['seq_len']} tokens, {work['precision']}"
    )
    strategy = plan.strategy
    lines = [
        head,
        f"  {strategy}, {plan.microbatches} microbatches, {strategy.schedule}",
        f"  step {_seconds(predicted.step_seconds)}   {predicted.tokens_per_second:,.0f} tokens/s"
        f"   MFU {predicted.mfu:.1%}",
        *_spent(plan),
        f"  lower bound {_seconds(plan.certificate.lower_bound_seconds)}, gap "
        f"{plan.certificate.gap:.1%}: {plan.certificate.solved} configurations solved, "
        f"{plan.certificate.pruned} pruned, {plan.certificate.infeasible} infeasible, "
        f"{plan.certificate.seconds:.1f} CPU s",
        *_mapping(plan),
        *(f"  {line}" for line in plan.advice),
        "",
    ]
    return render("\n".join(lines), _stages(plan), "", _parameters(plan))


def _spent(plan: Plan) -> list[str]:
    """What a step costs or takes, where that was to be least."""
    certificate = plan.certificate
    if certificate.objective == "time":
        return []
    return [
        f"  {certificate.objective} of a step {certificate.spent:.5g} {certificate.unit}, at least "
        f"{certificate.bound:.5g} with any plan"
    ]


def _mapping(plan: Plan) -> list[str]:
    """The order to start nodes in, where it matters."""
    mapping = plan.mapping
    if mapping is None or mapping.node_of == tuple(range(len(mapping.node_of))):
        return []
    order = f"  nodes in the order {' '.join(map(str, mapping.node_of))}"
    if not mapping.in_order_seconds:
        return [order]
    gain = 1 - mapping.seconds / mapping.in_order_seconds
    gap = 1 - mapping.bound_seconds / mapping.seconds
    return [
        f"{order}: communication between them takes {gain:.1%} less than in order, at most "
        f"{gap:.1%} more than possible"
    ]


_KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "buffers")


def _stages(plan: Plan) -> Table:
    unit, name = (GIB, "GiB") if max(plan.predicted.memory_bytes) >= GIB else (MIB, "MiB")
    shown = table(
        "Stages", "stage", "layers", "recompute", "weights", "grads", "optim", "activ",
        "logits", "work", "buffers", f"total {name}",
    )  # fmt: skip
    for i, stage in enumerate(plan.stages):
        if i < plan.strategy.pp:  # what a rank holds is told with its first stage
            kinds = plan.predicted.memory[i] if i < len(plan.predicted.memory) else {}
            cells = [f"{kinds.get(kind, 0) / unit:.1f}" for kind in _KINDS]
            limit = plan.predicted.limits_bytes[i] / unit
            cells.append(f"{plan.predicted.memory_bytes[i] / unit:.1f} of {limit:.1f}")
        else:
            cells = [""] * (len(_KINDS) + 1)
        shown.add_row(str(i), _range(plan, i), _modes(stage.recompute), *cells)
    return shown


def _range(plan: Plan, index: int) -> str:
    stage = plan.stages[index]
    segments = plan.model.segments[stage.first : stage.last]
    names = [".".join(s.module.split(".")[-2:]) or s.block for s in segments]
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def _modes(modes: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for mode in modes:
        if mode != "none":
            counts[mode] = counts.get(mode, 0) + 1
    return ", ".join(f"{count} {mode}" for mode, count in counts.items()) or "none"


def _parameters(plan: Plan) -> Table:
    shown = table("Parameters by block", "parameter", "shape", *plan.tensor_axes)
    for block, graph in plan.model.blocks.items():
        annotation = plan.annotations[block]
        count = sum(s.block == block for s in plan.model.segments)
        shown.add_row(f"{block}" + (f" x {count}" if count > 1 else ""))
        for name, kind in zip(graph.parameters, annotation.parameters, strict=True):
            shape = "x".join(map(str, graph.values[name].shape({})))
            shown.add_row(f"  {name}", shape, *(str(kind[axis]) for axis in plan.tensor_axes))
    return shown


def conversions(graph: Graph, annotation: Annotation) -> list[tuple[str, NdType, NdType]]:
    """(value, from, to) for every conversion a block carries out."""
    made = annotation.produced(graph)
    return [
        (name, made[name], kind)
        for name, kinds in annotation.needed(graph).items()
        if graph.values[name].grad
        for kind in kinds
        if kind != made[name]
    ]


def stored(zero: int, kind: NdType) -> NdType:
    """How a parameter is stored: as forward reads it along tensor axes; along dp split under ZeRO
    3 and whole, with its gradient summed, otherwise."""
    data = NdType((("dp", S(0) if zero == 3 else I),))
    return NdType(data.axes + tuple(item for item in kind.axes if item[0] != "dp"))


_SELDOM = ("etp", "zero_group", "gradient_group", "parameter_group", "sp")
"""Parts of a strategy that are shown where they are not the default."""


def prediction_text(found: Prediction) -> str:
    """A prediction as a table a person can read."""
    strategy, seconds = found.strategy, found.step_seconds
    shown = [
        f"{key}={value}"
        for key, value in strategy.to_json().items()
        if key != "stages" and (key not in _SELDOM or value not in (None, 0, 1))
    ]
    head = [
        f"{found.model.name or 'model'}: {' '.join(shown)}",
        f"  step {_seconds(seconds)}   {found.tokens_per_second:,.0f} tokens/s   "
        f"MFU {found.mfu:.1%}   HFU {found.hfu:.1%}",
    ]
    if not found.fits:
        beyond = zip(found.memory_bytes, found.memory_limits_bytes, strict=True)
        over = max(held - limit for held, limit in beyond) / GIB
        head.append(f"  DOES NOT FIT: the fullest stage is {over:.1f} GiB over the limit")
    times = table("Time of a step", "part", "seconds", "share")
    for part, spent in found.time.items():
        if spent:
            times.add_row(part.replace("_", " "), f"{spent:.4g}", f"{spent / seconds:.1%}")
    kinds = list(found.memory[0].to_json())
    stages = table("Memory per pipeline rank, GiB", "rank", "layers", *kinds, "total")
    for rank, stage in enumerate(found.memory):
        cells = [f"{value / GIB:.2f}" for value in stage.to_json().values()]
        layers = str(strategy.layers[rank]) if rank < len(strategy.layers) else ""
        limit = found.memory_limits_bytes[rank] / GIB
        stages.add_row(str(rank), layers, *cells, f"{stage.total / GIB:.2f} of {limit:.2f}")
    return render("\n".join(head), "", times, "", stages)


def to_json(plan: Plan) -> dict[str, object]:
    """The fields of `plan --json` that scripts rely on."""
    certificate, predicted = plan.certificate, plan.predicted
    stages, types = plan.parameter_stages(), plan.parameter_types()
    return {
        "model": plan.model.name,
        "strategy": plan.strategy.to_json(),
        "predicted": {
            "step_seconds": predicted.step_seconds,
            "tokens_per_second": predicted.tokens_per_second,
            "mfu": predicted.mfu,
            "memory_bytes": list(predicted.memory_bytes),
            "memory_limit_bytes": predicted.memory_limit_bytes,
            "memory_limits_bytes": list(predicted.limits_bytes),
            "time": dict(predicted.time),
        },
        "certificate": {
            "lower_bound_seconds": certificate.lower_bound_seconds,
            "gap": certificate.gap,
            "solved": certificate.solved,
            "pruned": certificate.pruned,
            "infeasible": certificate.infeasible,
            "seconds": certificate.seconds,
            "relaxation": dict(certificate.relaxation),
            "objective": certificate.objective,
            "spent": certificate.spent,
            "bound": certificate.bound,
            "unit": certificate.unit,
        },
        "parameters": {
            name: {"stages": stages[name], "sbp": stored(plan.strategy.zero, kind).to_json()}
            for name, kind in types.items()
        },
        "advice": list(plan.advice),
        "mapping": None if plan.mapping is None else asdict(plan.mapping),
        "alternatives": [
            {
                "strategy": other.strategy.to_json(),
                "step_seconds": other.step_seconds,
                "memory_bytes": other.memory_bytes,
                "reason": other.reason,
                "time": dict(other.time),
            }
            for other in plan.alternatives
        ],
    }


def replan_text(found: Replanned) -> str:
    """A new plan beside the old one, and what getting there takes."""
    plan, moved = found.plan, found.migration
    now, before = plan.predicted.step_seconds, found.before_seconds
    slower = now / before - 1
    lost = f"lost nodes {', '.join(map(str, found.lost))}" if found.lost else "nodes joined"
    checkpoint = ""
    if moved.lost_bytes:
        checkpoint = f", and {_bytes(moved.lost_bytes)} from a checkpoint: no device left has them"
    total = moved.moved_bytes + moved.lost_bytes
    pieces = sum(move.source is not None for move in moved.moves)
    above = f"{total / max(1, moved.bound_bytes) - 1:.1%} more than the least possible"
    lines = [
        f"{lost}: {plan.strategy} on {plan.cluster['nodes']} nodes",
        f"  a step takes {_seconds(now)}, {abs(slower):.1%} {'more' if slower > 0 else 'less'} "
        f"than before ({_seconds(before)})",
        f"  moving: {_bytes(moved.moved_bytes)} between devices in {pieces} pieces, "
        f"{_seconds(moved.seconds)} over the links{checkpoint} ({above})",
    ]
    return "\n".join([*lines, *(_waiting(found.wait) if found.wait is not None else [])])


def _waiting(wait: Waiting) -> list[str]:
    """The new plan beside waiting for the repair."""
    least = wait.break_even_seconds
    lines = []
    if wait.wait_seconds is not None and wait.repair_seconds is not None:
        gain = wait.wait_seconds - wait.replan_seconds
        ahead = f"{wait.steps:,} steps"
        lines = [
            f"{'':33}{'now':>12}{'a step':>12}{ahead:>18}",
            f"  going on with the new plan     {_seconds(wait.move_seconds):>12}"
            f"{_seconds(wait.after_seconds):>12}{_seconds(wait.replan_seconds):>18}",
            f"  waiting for the repair         {_seconds(wait.repair_seconds):>12}"
            f"{_seconds(wait.before_seconds):>12}{_seconds(wait.wait_seconds):>18}",
            f"  {'going on' if gain > 0 else 'waiting'} is {_seconds(abs(gain))} faster",
        ]
    pays = f"where it takes more than {_seconds(least)}" if least else "however short it is"
    return [
        *lines,
        f"  waiting for the repair instead: the new plan has done {wait.steps:,} steps earlier "
        f"{pays}; moving there and back pays where it takes more than "
        f"{_seconds(wait.returning_seconds)}",
        "  not counted on either side: reading a checkpoint, steps since it, starting programs",
    ]


def _bytes(number: int) -> str:
    for size, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number} B"
