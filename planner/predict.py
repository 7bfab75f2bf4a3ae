"""What a given configuration takes: the engine of `plan` without its search."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

from ..costmodel.cluster import Cluster
from ..costmodel.memory import StageBytes
from ..ir import Infeasible, InvalidInput
from ..ir.from_dims import expert_binding
from ..ir.graph import Model, bind
from ..ir.mesh import Axis, Mesh
from ..ir.optable import TABLE
from ..ir.plan import Annotation, Recompute, Strategy
from ..ir.schedule_rows import default_vpp, schedule_placement
from .candidates import ZERO_GROUPS, Candidate, expert_products, placement_of
from .chain import Chain
from .costs import ModelCosts
from .experts import ExpertPart
from .fix import Fix
from .footprint import host_room
from .inner import MODES, Inner, chosen_types, inner_of, splits_anything, sub_axes
from .report import prediction_text, stored
from .request import Request, bounds_of, pinned_types, repeated
from .sbp_program import solve
from .sites import Sites
from .step import price_step
from .traffic import in_order

Types = Mapping[str, Annotation]
"""Block → the types of its values on the tensor axes."""

_WILLING_PRICE_S_PER_BYTE = 1e-9
"""What a byte of parameter state costs on the device `willing`, as much as sending it: no whole
copies of parameters on tensor ranks, however large the microbatch."""

_KEPT_MODELS = 4
_known: OrderedDict[int, tuple[Model, dict[Hashable, Types]]] = OrderedDict()
"""Types solved for the last few models, by all that they depend on: a memory, never a decision."""


def _types_of(model: Model) -> dict[Hashable, Types]:
    """The types solved so far for a model."""
    known, types = _known.pop(id(model), (model, {}))
    _known[id(model)] = (model, types if known is model else {})
    while len(_known) > _KEPT_MODELS:
        _known.popitem(last=False)
    return _known[id(model)][1]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step of one configuration.

    `time` is seconds by cause and adds up to `step_seconds`; `memory` bytes per pipeline rank by
    kind, without the device's reserve; `mfu` counts the model's FLOPs, `hfu` those executed.
    `annotations` are the types of blocks on the tensor axes, `bounds` the segments at which
    (virtual) stages begin and end.
    """

    strategy: Strategy
    step_seconds: float
    tokens_per_second: float
    mfu: float
    hfu: float
    time: Mapping[str, float]
    memory: tuple[StageBytes, ...]
    memory_limit_bytes: int
    memory_limits_bytes: tuple[int, ...]
    model: Model
    annotations: Mapping[str, Annotation]
    bounds: tuple[int, ...]
    host_limit_bytes: float = float("inf")

    def __str__(self) -> str:
        return prediction_text(self)

    @property
    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes per pipeline rank."""
        return tuple(stage.total for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the memory that a plan may use, on the device and beside it."""
        most = max(stage.host for stage in self.memory)
        inside = zip(self.memory_bytes, self.memory_limits_bytes, strict=True)
        return all(held <= limit for held, limit in inside) and most <= self.host_limit_bytes

    def to_json(self) -> dict[str, Any]:
        """What `shardwright predict --json` prints."""
        return {
            "strategy": self.strategy.to_json(),
            "predicted": {
                "step_seconds": self.step_seconds,
                "tokens_per_second": self.tokens_per_second,
                "mfu": self.mfu,
                "hfu": self.hfu,
                "fits": self.fits,
                "memory_bytes": list(self.memory_bytes),
                "memory_limit_bytes": self.memory_limit_bytes,
                "time": dict(self.time),
                "memory": [stage.to_json() for stage in self.memory],
            },
            "parameters": self.parameters(),
            "alternatives": [],
        }

    def parameters(self) -> dict[str, dict[str, Any]]:
        """Parameter name → the virtual stages that hold it, and its stored type per axis."""
        found: dict[str, dict[str, Any]] = {}
        split = {
            block: ExpertPart.of(graph).parameters if self.strategy.ep > 1 else frozenset()
            for block, graph in self.model.blocks.items()
        }
        for stage, (first, last) in enumerate(pairwise(self.bounds)):
            for segment in self.model.segments[first:last]:
                types = self.annotations[segment.block].parameters
                graph = self.model.blocks[segment.block]
                for name, own, kind in zip(
                    segment.parameters, graph.parameters, types, strict=True
                ):
                    sbp = stored(self.strategy.zero, kind).to_json()
                    if own in split[segment.block]:  # of its first dim, the experts
                        sbp["ep"] = "S(0)"
                    entry = found.setdefault(name, {"stages": [], "sbp": sbp})
                    entry["stages"] += [stage] * (stage not in entry["stages"])
        return found


def predict(request: Request) -> Prediction:
    """Prices the configuration that `request.fix` describes; what it leaves open is 1 or the
    default.

    Raises InvalidInput for degrees that do not multiply to the devices or do not divide the model
    or the batch.
    """
    candidate = candidate_of(request)
    request.check()
    views = Sites.of(request.hardware or request.cluster, request.cluster).views(candidate)
    known = {id(view): _inner(request, candidate, view) for view in views}
    inners = [known[id(view)] for view in views]
    bounds = _bounds(request, candidate)
    layers = repeated(request.model)
    mode = _mode(request.fix)
    modes = [
        ["none" if i not in layers else mode for i in range(first, last)]
        for first, last in pairwise(bounds)
    ]
    slowdown = in_order(request.cluster, candidate, views)
    price = price_step(request, candidate, inners, bounds, modes, slowdown=slowdown)
    work, cluster = request.workload, request.cluster
    seconds = price.seconds
    peak = request.peak_flops_per_s
    counts, per_rank = layers.per_stage(bounds), [0] * candidate.pp
    for rank, count in zip(placement_of(candidate), counts, strict=True):
        per_rank[rank] += count
    return Prediction(
        candidate.strategy(mode, per_rank, request.fix.sp),
        seconds,
        work.global_batch * work.seq_len / seconds,
        request.flops_per_step() / (seconds * peak),
        price.flops * cluster.world_size / (seconds * peak),
        price.time,
        price.memory,
        request.limit_bytes,
        tuple(int(inner.cluster.device.memory_limit_bytes) for inner in inners),
        request.model,
        inners[0].annotations,
        tuple(bounds),
        min(map(host_room, inners)),
    )


def _mode(fix: Fix) -> Recompute:
    return next((mode for mode in MODES if mode == fix.recompute), "none")


def candidate_of(request: Request) -> Candidate:
    """The configuration that is fixed, checked against devices, batch and layers."""
    fix, world = request.fix, request.cluster.world_size
    pp, tp, cp = fix.pp or len(fix.stages or (0,)), fix.tp or 1, fix.cp or 1
    if world % (pp * tp * cp):
        raise InvalidInput(
            f"--fix: pp*cp*tp = {pp}*{cp}*{tp} does not divide the cluster's {world} devices"
        )
    dp = world // (pp * tp * cp) if fix.dp is None else fix.dp
    if pp * dp * cp * tp != world:
        raise InvalidInput(
            f"--fix: pp*dp*cp*tp = {pp}*{dp}*{cp}*{tp} = {pp * dp * cp * tp}, expected the "
            f"cluster's {world} devices"
        )
    batch, micro = request.workload.global_batch, fix.micro_batch or 1
    if batch % (dp * micro):
        raise InvalidInput(
            f"--fix: dp*micro_batch = {dp}*{micro} does not divide global_batch {batch}"
        )
    if request.workload.seq_len % (cp * (tp if fix.sp else 1)):
        raise InvalidInput(
            f"--fix: cp={cp}{f', sp=1 with tp={tp}' if fix.sp else ''} does not divide seq_len "
            f"{request.workload.seq_len}"
        )
    schedule = fix.schedule_name
    vpp = default_vpp(schedule) if fix.vpp is None else fix.vpp
    try:
        schedule_placement(schedule, pp, batch // (dp * micro), vpp)
    except InvalidInput as error:
        raise InvalidInput(f"--fix: {error}") from None
    ep, etp = fix.ep or 1, fix.etp or 1
    _check_heads(request.model, tp)
    _check_experts(request.model, ep, etp)
    if fix.attention not in (None, "ring" if cp > 1 else "heads"):
        raise InvalidInput(
            f"--fix: attention={fix.attention} with cp={cp} is not priced yet, expected "
            f"{'ring' if cp > 1 else 'heads'}"
        )
    if fix.stages is not None and len(fix.stages) != pp * vpp:
        raise InvalidInput(
            f"--fix: stages has {len(fix.stages)} stages, expected pp*vpp = {pp}*{vpp}"
        )
    layers = repeated(request.model).count
    if pp * vpp > layers + 2:
        raise InvalidInput(f"--fix: pp*vpp = {pp}*{vpp} stages, but the model has {layers} layers")
    groups = _zero_groups(fix, dp * cp)
    if (dp * cp * tp) % (ep * etp):
        raise InvalidInput(f"--fix: ep*etp = {ep}*{etp} does not divide dp*cp*tp = {dp * cp * tp}")
    return Candidate(
        pp, dp, tp, fix.zero or 0, micro, batch // (dp * micro), schedule, vpp, cp, ep, etp,
        zero_group=groups[0], gradient_group=groups[1], parameter_group=groups[2],
    )  # fmt: skip


def _zero_groups(fix: Fix, replicas: int) -> tuple[int, int, int]:
    """`ZERO_GROUPS` as they are fixed; raises InvalidInput where ZeRO or the ranks do not allow
    them."""
    zero, most = fix.zero or 0, replicas
    found: list[int] = []
    for name, least, given in zip(ZERO_GROUPS, (1, 2, 3), fix.zero_groups, strict=True):
        if given and zero < least:
            expected = ("zero=1, 2 or 3", "zero=2 or 3", "zero=3")[least - 1]
            what = f"with zero={zero}" if zero else "without ZeRO"
            raise InvalidInput(f"--fix: {name}={given} {what}, expected {expected}")
        if given and most % given:
            whole = f"dp*cp = {replicas}" if most == replicas else f"the {most} ranks around it"
            raise InvalidInput(f"--fix: {name}={given} does not divide {whole}")
        found.append(given or 0)
        most = given or most
    return found[0], found[1], found[2]


def _check_heads(model: Model, tp: int) -> None:
    """Raises InvalidInput where heads of attention cannot be shared out, which no framework runs.
    (A plan may: it splits other loops and keeps attention whole.)"""
    for graph in model.blocks.values():
        for op in graph.ops:
            if TABLE[op.kind].work == "attention":
                heads = prod(bind(op.sizes[factor], {}) for factor in op.rule.operands[0][1])
                if heads % tp:
                    raise InvalidInput(
                        f"--fix: tp={tp} does not divide the model's {heads} attention heads"
                    )


def _check_experts(model: Model, ep: int, etp: int) -> None:
    """Raises InvalidInput where experts, or what is inside one, cannot be shared out."""
    products = expert_products(model)
    if (ep > 1 or etp > 1) and not products:
        raise InvalidInput(f"--fix: ep={ep}, etp={etp}, but the model has no experts")
    for count, width in products:
        if count % ep:
            raise InvalidInput(f"--fix: ep={ep} does not divide the model's {count} experts")
        if width % etp:
            raise InvalidInput(f"--fix: etp={etp} does not divide the {width} outputs of an expert")


def _bounds(request: Request, candidate: Candidate) -> tuple[int, ...]:
    """Stages as given, or as even as layers allow: where they do not divide but would with the two
    ends counted as layers, the ends' stages have one less (Megatron-DeepSpeed's partition); else
    the first stages have one more."""
    fixed = request.fix.stages
    if fixed is not None:
        return bounds_of(request.model, fixed)
    layers, stages = repeated(request.model).count, candidate.pp * candidate.vpp
    each, rest = divmod(layers, stages)
    counts = [each + (i < rest) for i in range(stages)]
    if rest and (layers + 2) % stages == 0 and stages > 1:
        counts = [(layers + 2) // stages] * stages
        counts[0] -= 1
        counts[-1] -= 1
    return bounds_of(request.model, tuple(counts))


def _inner(request: Request, candidate: Candidate, view: Cluster) -> Inner:
    """Blocks with types, and prices on the part of the cluster that a pipeline rank sees."""
    model = request.model
    chain = replace(Chain.of(model, pinned_types(model)), sequence_split=request.fix.sp)
    axes = sub_axes(model, candidate.tp)
    mesh = Mesh.of(pp=candidate.pp, dp=candidate.dp, tp=candidate.tp).factored("tp", axes)
    binding = expert_binding(
        model, {"b": candidate.micro_batch, "s": request.workload.seq_len // candidate.cp}
    )
    tensor = tuple(axis for axis in mesh.axes if axis.parent == "tp")
    costs = ModelCosts(
        request.cluster, mesh, tensor, binding, request.precision, model.blocks, request.runtime,
        candidate=candidate,
    )  # fmt: skip
    planned = request.runtime.layout == "planned"
    where = request.cluster if planned and candidate.tp > 1 else None
    stride = mesh.stride(tensor[0].name), mesh.stride(tensor[-1].name)
    key = (candidate.tp, request.fix.sp, tuple(binding.items()), request.precision, where, stride,
           request.runtime)  # fmt: skip
    known = _types_of(model)
    if key not in known:
        try:
            known[key] = _decided(chain, costs, planned)
        except Infeasible as error:
            raise InvalidInput(f"--fix: tp={candidate.tp}: {error}") from None
    if candidate.tp > 1 and not splits_anything(tensor, known[key]):
        raise InvalidInput(
            f"--fix: tp={candidate.tp}: no operation of the model can be split over "
            f"{candidate.tp} devices (heads, hidden sizes and vocabulary do not divide by it)"
        )
    priced = costs if view is request.cluster else replace(costs, cluster=view)
    return inner_of(chain, known[key], priced, [_mode(request.fix), "none"])


def _decided(chain: Chain, costs: ModelCosts, planned: bool) -> Types:
    """Types as the search decides them; where that splits nothing, and for frameworks whose layout
    is given, as they are decided on a device on which every split of a product pays."""
    if planned:
        types = chosen_types(chain, costs)[0]
        if splits_anything(costs.axes, types):
            return types
    size = prod(axis.size for axis in costs.axes)
    willing = replace(
        costs,
        cluster=Cluster.preset("willing", 1, size),
        mesh=Mesh(tuple(Axis(a.name, a.size, a.parent) for a in costs.axes)),
        candidate=None,
        memory_price_s_per_byte=_WILLING_PRICE_S_PER_BYTE,
        state_bytes=16,
    )
    return solve(chain, costs.axes, {**costs.binding, "b": 1}, willing).annotations
