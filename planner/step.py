"""The price of a step: stages of priced blocks, a schedule, what happens once per step, memory.

One engine for `plan` and `predict`: both hand it a configuration, the priced inside of blocks and
how the chain of segments is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from ..costmodel.cluster import Cluster
from ..costmodel.collectives import Group, collective_seconds
from ..costmodel.device import Device
from ..costmodel.memory import StageBytes
from ..costmodel.overlap import exposed_seconds, outer_exposed_seconds
from ..costmodel.pipeline import schedule_estimate_seconds
from ..costmodel.simulate import DataParallel, StageTimes, StepOptions, Transfer, simulate
from ..costmodel.steptime import (
    SyncSeconds,
    accumulation_seconds,
    data_parallel_sync,
    optimizer_step_seconds,
)
from ..costmodel.work import Work
from ..ir.plan import Recompute
from ..ir.schedule_rows import schedule_table
from .candidates import Candidate, placement_of
from .footprint import Parameters, rank_bytes
from .footprint import in_flight as in_flight
from .footprint import rank_state as rank_state
from .inner import Inner
from .request import Request, repeated
from .traffic import Slowdown, StageTraffic


@dataclass(frozen=True, slots=True)
class StepPrice:
    """Seconds of a step by cause (they add up to it), and bytes per pipeline rank.

    `flops` are executed per rank in a step, and `busy_seconds` are what it computes for, both on
    average and with recomputation.
    """

    time: Mapping[str, float]
    memory: tuple[StageBytes, ...]
    flops: float
    busy_seconds: float

    @property
    def seconds(self) -> float:
        return sum(self.time.values())


@dataclass(frozen=True, slots=True)
class StageWork:
    """A (virtual) stage for one microbatch, and what it holds."""

    forward: Work
    backward: Work
    weights_s: float
    parameters: Parameters
    sync: SyncSeconds
    carried_bytes: int
    device: Device

    @property
    def seconds(self) -> float:
        return self.forward.total_s + self.backward.total_s

    def slowed(self, data: float, tensor: float) -> StageWork:
        """The stage with its data- and tensor-parallel communication taking so much longer; context
        and expert parallelism are laid over the data-parallel ranks."""
        passes = []
        for work in (self.forward, self.backward):
            work = work.scaled("tensor_parallel", tensor)
            passes.append(work.scaled("context_parallel", data).scaled("expert_parallel", data))
        return replace(self, forward=passes[0], backward=passes[1], sync=self.sync.scaled(data))


def price_step(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
    exact: bool = True,
    slowdown: Slowdown | None = None,
) -> StepPrice:
    """Time and memory of a step.

    `inners` are the insides of blocks as each pipeline rank has them (one and the same where all
    devices and links are alike). `bounds` cut the segments into pp x vpp virtual stages in order of
    the model, `modes` are the recompute modes of each one's segments. `exact`: the schedule is
    simulated, with what surrounds it; otherwise estimated, which a search can afford for every
    configuration. `slowdown`: what links make of communication where the configuration is placed.
    """
    stages = stages_of(request, candidate, inners, bounds, modes)
    if slowdown is not None:
        stages = [
            stage.slowed(data, tensor)
            for stage, data, tensor in zip(stages, slowdown.data, slowdown.tensor, strict=True)
        ]
    boundary = None if slowdown is None else slowdown.boundary
    ranks = _ranks(candidate, stages)
    m = candidate.microbatches
    busiest = max(ranks, key=lambda rank: sum(stage.seconds for stage in rank))
    time: dict[str, float] = {}
    for stage in busiest:
        for work in (stage.forward, stage.backward):
            for cause, seconds in work.seconds.items():
                time[cause] = time.get(cause, 0.0) + m * seconds
    transfers = _transfers(request, candidate, stages, boundary)
    time |= (_simulated if exact else _estimated)(request, candidate, stages, ranks, transfers)
    flops = m * sum(s.forward.flops + s.backward.flops for s in stages) / candidate.pp
    busy = m * sum(s.forward.compute_s + s.backward.compute_s for s in stages) / candidate.pp
    return StepPrice(time, rank_bytes(request, candidate, inners, bounds, modes), flops, busy)


def stages_of(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
) -> list[StageWork]:
    """Every (virtual) stage; those of the same blocks in the same modes are priced once."""
    model, found = request.model, []
    known: dict[Hashable, StageWork] = {}
    placement = placement_of(candidate)
    for rank, (first, last), kinds in zip(placement, pairwise(bounds), modes, strict=True):
        segments, inner = model.segments[first:last], inners[rank]
        tied = [p for s in segments for p in s.parameters if p in model.tied] if model.tied else ()
        key = (
            tuple(segment.block for segment in segments),
            tuple(kinds),
            tuple(tied),
            id(inner),
        )
        if key not in known:
            known[key] = _stage(request, candidate, inner, first, last, kinds)
        found.append(known[key])
    return found


def _stage(
    request: Request,
    candidate: Candidate,
    inner: Inner,
    first: int,
    last: int,
    modes: Sequence[Recompute],
) -> StageWork:
    forward, backward, weights_s = Work(), Work(), 0.0
    segments = request.model.segments[first:last]
    for (block, mode), count in Counter(
        (segment.block, mode) for segment, mode in zip(segments, modes, strict=True)
    ).items():
        cost = inner.costs[block, mode]
        forward.add(cost.forward, count)
        backward.add(cost.backward, count)
        weights_s += count * cost.weights_s
    parameters = Parameters.of(request, inner, first, last)
    device = inner.cluster.device
    if candidate.microbatches > 1 and not request.runtime.fused_accumulation:
        added = accumulation_seconds(
            device, parameters.elements, request.precision, request.runtime.gradient_bytes
        )
        backward.add(Work({"pointwise": added}))
    sync = sync_seconds(request, candidate, inner.cluster, parameters.dense, parameters.experts)
    carried = inner.carried_bytes[segments[-1].block]
    return StageWork(forward, backward, weights_s, parameters, sync, carried, device)


def sync_seconds(
    request: Request, candidate: Candidate, cluster: Cluster, dense: float, experts: float
) -> SyncSeconds:
    """Data-parallel communication of so many parameters of dense layers and of experts."""
    if candidate.local_update:
        return _apart_seconds(request, candidate, cluster, dense)
    parts = [(candidate.data, candidate.shards, dense)]
    if experts:
        parts.append((candidate.expert_data, candidate.expert_shards, experts))
    found = [
        data_parallel_sync(
            cluster,
            group,
            elements,
            request.precision,
            candidate.zero,
            shards=shards,
            gradient_bytes=request.runtime.gradient_bytes,
        )
        for group, shards, elements in parts
    ]
    return SyncSeconds(*(sum(getattr(one, f.name) for one in found) for f in fields(SyncSeconds)))


def _apart_seconds(
    request: Request, candidate: Candidate, cluster: Cluster, elements: float
) -> SyncSeconds:
    """The same of groups of replicas that train apart: those that share state out keep to
    themselves, and each rank averages its part of the parameters with the other groups, in the
    dtype of gradients. What an outer optimizer keeps is used once in many steps and lies in host
    memory."""
    together = candidate.zero_group or 1
    stride, each = candidate.data.stride, request.runtime.gradient_bytes
    inside = data_parallel_sync(
        cluster, Group(together, stride), elements, request.precision, candidate.zero,
        gradient_bytes=each,
    )  # fmt: skip
    others = Group(candidate.replicas // together, stride * together)
    size = elements / together * request.precision.gradient_bytes
    return replace(inside, outer_s=collective_seconds(cluster, "all_reduce", size, others))


def _outer_seconds(
    request: Request, candidate: Candidate, ranks: Sequence[Sequence[StageWork]], pipeline_s: float
) -> float:
    """What averaging parameters once in several steps adds to each."""
    if not candidate.local_update:
        return 0.0
    once = max(sum(stage.sync.outer_s for stage in rank) for rank in ranks)
    beside = request.runtime.overlap_gradients
    return outer_exposed_seconds(once, pipeline_s, candidate.local_update, beside)


def _ranks(candidate: Candidate, stages: Sequence[StageWork]) -> list[list[StageWork]]:
    """The virtual stages of every pipeline rank."""
    ranks: list[list[StageWork]] = [[] for _ in range(candidate.pp)]
    placement = placement_of(candidate)
    for rank, stage in zip(placement, stages, strict=True):
        ranks[rank].append(stage)
    return ranks


def _simulated(
    request: Request,
    candidate: Candidate,
    stages: Sequence[StageWork],
    ranks: Sequence[Sequence[StageWork]],
    transfers: Sequence[float],
) -> dict[str, float]:
    """What a step takes beyond the work of its busiest rank, from its timeline."""
    runtime, m = request.runtime, candidate.microbatches
    table = schedule_table(candidate.schedule, candidate.pp, m, candidate.vpp)
    each_step = runtime.outer_every == 1
    sync = DataParallel(
        tuple(each_step * stage.sync.reduce_per_step_s for stage in stages),
        tuple(each_step * stage.sync.gather_per_step_s for stage in stages),
        buckets=max(1, repeated(request.model).count // len(stages)),
        overlapped=_overlaps(request, candidate),
        at_start=runtime.overlap_gathers,
    )
    optimizer = tuple(_optimizer_seconds(request, candidate, rank) for rank in ranks)
    options = StepOptions(_transfer(request), sync, optimizer)
    timeline = simulate(table, _times(request, stages), transfers, options)
    busy = m * max(sum(stage.seconds for stage in rank) for rank in ranks)
    slowest = int(timeline.busy_s.argmax())
    sharded = float(timeline.busy_s[slowest]) - busy  # per microbatch, inside the stages
    sent = float(timeline.exposed_transfer_s[slowest])
    last = max(optimizer)
    outer = _outer_seconds(request, candidate, ranks, timeline.pipeline_s)
    if not each_step:
        once = max(sum(stage.sync.per_step_s for stage in rank) for rank in ranks)
        outer += outer_exposed_seconds(
            once, timeline.pipeline_s, runtime.outer_every, runtime.overlap_gradients
        )
    bubble = max(0.0, timeline.pipeline_s - busy - sharded - sent)
    waits = max(0.0, timeline.step_s - timeline.pipeline_s - last + sharded) + outer
    if candidate.pp == 1:  # what it waits for are the parameters of its first layers
        bubble, waits = 0.0, waits + bubble
    return {
        "pipeline_bubble": bubble,
        "pipeline_p2p": sent,
        "data_parallel": waits,
        "optimizer": last,
    }


def _estimated(
    request: Request,
    candidate: Candidate,
    stages: Sequence[StageWork],
    ranks: Sequence[Sequence[StageWork]],
    transfers: Sequence[float],
) -> dict[str, float]:
    """The same in closed form: synchronisation once per step hides behind one microbatch of the
    rank that has most of it."""
    runtime, m = request.runtime, candidate.microbatches
    times = _times(request, stages)
    busy = m * max(sum(stage.seconds for stage in rank) for rank in ranks)
    total = schedule_estimate_seconds(
        candidate.schedule, times, transfers, m, candidate.vpp, _transfer(request)
    )
    exposed = 0.0
    for rank in ranks:
        compute = sum(stage.seconds for stage in rank)
        reduces = sum(stage.sync.reduce_per_step_s for stage in rank)
        gathers = sum(stage.sync.gather_per_step_s for stage in rank)
        hidden = reduces * _overlaps(request, candidate) + gathers * runtime.overlap_gathers
        exposed = max(exposed, reduces + gathers - hidden + exposed_seconds(hidden, compute))
    return {
        "pipeline_bubble": total - busy,
        "pipeline_p2p": 0.0,
        "data_parallel": exposed + _outer_seconds(request, candidate, ranks, total),
        "optimizer": max(_optimizer_seconds(request, candidate, rank) for rank in ranks),
    }


def _overlaps(request: Request, candidate: Candidate) -> bool:
    """Whether gradients are reduced beside the backward pass."""
    runtime = request.runtime
    return runtime.overlap_gradients and candidate.zero >= runtime.overlap_from_zero


def _transfer(request: Request) -> Transfer:
    return "blocking" if request.runtime.transfer_blocks else "overlapped"


def _times(request: Request, stages: Sequence[StageWork]) -> StageTimes:
    """Per microbatch, with data-parallel communication of every microbatch (ZeRO-2 and -3)."""
    passes = [_seconds(request, stage) for stage in stages]
    return StageTimes(
        tuple(forward for forward, _ in passes),
        tuple(
            backward - stage.weights_s for (_, backward), stage in zip(passes, stages, strict=True)
        ),
        tuple(stage.weights_s for stage in stages),
    )


def _seconds(request: Request, stage: StageWork) -> tuple[float, float]:
    """Forward and backward of a microbatch with its own gathers and reductions: what does not hide
    behind the pass beside it, and what hiding costs."""
    runtime, sync = request.runtime, stage.sync
    forward, backward = stage.forward.total_s, stage.backward.total_s
    gathers, reduces = sync.gather_per_microbatch_s / 2, sync.reduce_per_microbatch_s
    found = []
    for compute, parts in (
        (forward, ((gathers, runtime.overlap_gathers),)),
        (
            backward,
            ((gathers, runtime.overlap_gathers), (reduces, runtime.overlap_gradients)),
        ),
    ):
        hidden = sum(seconds for seconds, overlaps in parts if overlaps)
        plain = sum(seconds for seconds, overlaps in parts if not overlaps)
        found.append(compute + plain + exposed_seconds(hidden, compute))
    return found[0], found[1]


def _transfers(
    request: Request,
    candidate: Candidate,
    stages: Sequence[StageWork],
    boundary: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Seconds from each stage to the next, `boundary` times what the cost model says."""
    sizes = [stage.carried_bytes for stage in stages[:-1]]
    seconds = {size: transfer_seconds(request, candidate, size) for size in set(sizes)}
    factors = [1.0] * len(sizes) if boundary is None else boundary
    return tuple(factor * seconds[size] for factor, size in zip(factors, sizes, strict=True))


def traffic_of(
    request: Request, candidate: Candidate, stages: Sequence[StageWork]
) -> list[StageTraffic]:
    """What every stage communicates in a step; the last hands nothing on."""
    m = candidate.microbatches
    handed_on = [*_transfers(request, candidate, stages), 0.0]
    return [
        StageTraffic(
            stage.sync.per_step_s
            + m * stage.sync.per_microbatch_s
            + stage.sync.outer_s / max(1, candidate.local_update),
            m * sum(work.seconds.get("tensor_parallel", 0.0)
                    for work in (stage.forward, stage.backward)),
            2 * seconds,
        )
        for stage, seconds in zip(stages, handed_on, strict=True)
    ]  # fmt: skip


def transfer_seconds(request: Request, candidate: Candidate, carried_bytes: float) -> float:
    """Seconds to hand an activation (or its gradient) to the next stage."""
    cluster, runtime = request.cluster, request.runtime
    if runtime.transfer_split and candidate.tp > 1:
        part = collective_seconds(cluster, "send", carried_bytes / candidate.tp, candidate.pipe)
        tensor = Group(candidate.tp)
        return part + collective_seconds(cluster, "all_gather", carried_bytes, tensor)
    return collective_seconds(cluster, "send", carried_bytes, candidate.pipe)


def _optimizer_seconds(request: Request, candidate: Candidate, rank: Sequence[StageWork]) -> float:
    held = Parameters()
    for stage in rank:
        held |= stage.parameters
    return optimizer_step_seconds(rank[0].device, held.sharded(candidate), request.precision)
