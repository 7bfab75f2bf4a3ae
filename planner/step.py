"""The price of a step: stages of priced blocks, a schedule, what happens once per step, memory.

One engine for `plan` and `predict`: both hand it a configuration, the priced inside of blocks and
how the chain of segments is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise

from ..costmodel.collectives import Group, collective_seconds
from ..costmodel.memory import StageBytes, StateBytes, gather_bytes, stage_bytes, state_bytes
from ..costmodel.precision import Precision
from ..costmodel.steptime import (
    SyncSeconds,
    accumulation_seconds,
    data_parallel_sync,
    exposed_seconds,
    optimizer_step_seconds,
    pipeline_estimate_seconds,
)
from ..costmodel.work import Work
from ..ir.plan import Recompute
from .candidates import Candidate
from .inner import Inner
from .request import Request


@dataclass(frozen=True, slots=True)
class StepPrice:
    """Seconds of a step by cause (they add up to it), and bytes per pipeline rank.

    `flops` are executed by the busiest rank in a step, recomputation included.
    """

    time: Mapping[str, float]
    memory: tuple[StageBytes, ...]
    flops: float

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

    @property
    def seconds(self) -> float:
        return self.forward.total_s + self.backward.total_s


def price_step(
    request: Request,
    candidate: Candidate,
    inner: Inner,
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
) -> StepPrice:
    """Time and memory of a step.

    `bounds` cut the segments into pp x vpp virtual stages in order of the model, `modes` are the
    recompute modes of each one's segments.
    """
    stages = [
        _stage(request, candidate, inner, first, last, kinds)
        for (first, last), kinds in zip(pairwise(bounds), modes, strict=True)
    ]
    ranks = _ranks(candidate, stages)
    busiest = max(ranks, key=lambda rank: sum(stage.seconds for stage in rank))
    m = candidate.microbatches
    time: dict[str, float] = {}
    for stage in busiest:
        for work in (stage.forward, stage.backward):
            for cause, seconds in work.seconds.items():
                time[cause] = time.get(cause, 0.0) + m * seconds
    time |= _pipeline(request, candidate, stages, ranks)
    time |= {"data_parallel": 0.0, "optimizer": 0.0}
    for rank in ranks:
        time["data_parallel"] = max(time["data_parallel"], _sync_seconds(request, rank, m))
        optimizer = _optimizer_seconds(request, candidate, rank)
        time["optimizer"] = max(time["optimizer"], optimizer)
    flops = m * sum(s.forward.flops + s.backward.flops for s in busiest)
    memory = _memory(request, candidate, inner, bounds, modes)
    return StepPrice(time, memory, flops)


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
    for segment, mode in zip(segments, modes, strict=True):
        cost = inner.costs[segment.block, mode]
        forward.add(cost.forward)
        backward.add(cost.backward)
        weights_s += cost.weights_s
    parameters = Parameters()
    parameters.add(request, inner, first, last)
    if candidate.microbatches > 1 and not request.runtime.fused_accumulation:
        added = accumulation_seconds(
            request.cluster.device,
            parameters.elements,
            request.precision,
            request.runtime.gradient_bytes,
        )
        backward.add(Work({"pointwise": added}))
    sync = _sync(request, candidate, parameters)
    carried = inner.carried_bytes[segments[-1].block]
    return StageWork(forward, backward, weights_s, parameters, sync, carried)


@dataclass(slots=True)
class Parameters:
    """Elements that a rank computes with, by parameter name: of dense layers and of experts, which
    have different copies to be kept equal."""

    dense: dict[str, int] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        return sum(self.dense.values()) + sum(self.experts.values())

    def sharded(self, candidate: Candidate) -> float:
        """Elements whose optimizer state a rank has."""
        if candidate.zero == 0:
            return self.elements
        dense, experts = sum(self.dense.values()), sum(self.experts.values())
        return dense / candidate.shards + experts / candidate.expert_shards

    def add(self, request: Request, inner: Inner, first: int, last: int) -> None:
        """Adds those of segments first ... last-1; one used twice counts once."""
        for segment in request.model.segments[first:last]:
            graph = request.model.blocks[segment.block]
            experts = inner.expert_parameters[segment.block]
            sizes = inner.local_parameters[segment.block]
            for name, own, size in zip(segment.parameters, graph.parameters, sizes, strict=True):
                (self.experts if own in experts else self.dense)[name] = size


def _sync(request: Request, candidate: Candidate, parameters: Parameters) -> SyncSeconds:
    """Data-parallel communication of a stage: that of dense layers and that of experts."""
    parts = [(candidate.data, candidate.shards, parameters.dense)]
    if parameters.experts:
        parts.append((candidate.expert_data, candidate.expert_shards, parameters.experts))
    found = [
        data_parallel_sync(
            request.cluster,
            group,
            sum(elements.values()),
            request.precision,
            candidate.zero,
            shards=shards,
            gradient_bytes=request.runtime.gradient_bytes,
        )
        for group, shards, elements in parts
    ]
    return SyncSeconds(*(sum(getattr(one, f.name) for one in found) for f in fields(SyncSeconds)))


def _ranks(candidate: Candidate, stages: Sequence[StageWork]) -> list[list[StageWork]]:
    """The virtual stages of every pipeline rank."""
    return [list(stages[rank :: candidate.pp]) for rank in range(candidate.pp)]


def _pipeline(
    request: Request,
    candidate: Candidate,
    stages: Sequence[StageWork],
    ranks: Sequence[Sequence[StageWork]],
) -> dict[str, float]:
    """Seconds that the pipeline adds to the busiest rank's work: bubbles, and transfers."""
    pp, m, v = candidate.pp, candidate.microbatches, candidate.vpp
    if pp == 1:
        return {"pipeline_bubble": 0.0, "pipeline_p2p": 0.0}
    transfers = [transfer_seconds(request, candidate, stage.carried_bytes) for stage in stages[:-1]]
    rank_s = [sum(stage.seconds for stage in rank) for rank in ranks]
    hops = transfers[: pp - 1]
    total = pipeline_estimate_seconds(rank_s, hops, m)
    alone = pipeline_estimate_seconds(rank_s, [0.0] * (pp - 1), m)
    bubble = (alone - m * max(rank_s)) / v
    sent = total - alone
    if request.runtime.transfer_blocks:  # both ends wait for every transfer of a microbatch
        sent = max(sent, 2 * v * m * max(transfers))
    return {"pipeline_bubble": bubble, "pipeline_p2p": sent}


def transfer_seconds(request: Request, candidate: Candidate, carried_bytes: float) -> float:
    """Seconds to hand an activation (or its gradient) to the next stage."""
    cluster, runtime = request.cluster, request.runtime
    if runtime.transfer_split and candidate.tp > 1:
        part = collective_seconds(cluster, "send", carried_bytes / candidate.tp, candidate.pipe)
        tensor = Group(candidate.tp)
        return part + collective_seconds(cluster, "all_gather", carried_bytes, tensor)
    return collective_seconds(cluster, "send", carried_bytes, candidate.pipe)


def _sync_seconds(request: Request, rank: Sequence[StageWork], microbatches: int) -> float:
    """What data-parallel communication adds to a rank's step: all of it, or what does not hide
    behind the compute of a microbatch."""
    runtime = request.runtime
    compute = sum(stage.seconds for stage in rank)
    reduce_s = sum(stage.sync.reduce_per_microbatch_s for stage in rank)
    gather_s = sum(stage.sync.gather_per_microbatch_s for stage in rank)
    reduce_once = sum(stage.sync.reduce_per_step_s for stage in rank)
    gather_once = sum(stage.sync.gather_per_step_s for stage in rank)
    total = 0.0
    for times, reduces, gathers in (
        (microbatches, reduce_s, gather_s),
        (1, reduce_once, gather_once),
    ):
        hidden = reduces * runtime.overlap_gradients + gathers * runtime.overlap_gathers
        total += times * (reduces + gathers - hidden + exposed_seconds(hidden, compute))
    return total


def _optimizer_seconds(request: Request, candidate: Candidate, rank: Sequence[StageWork]) -> float:
    elements = sum(stage.parameters.sharded(candidate) for stage in rank)
    return optimizer_step_seconds(request.cluster.device, elements, request.precision)


def _memory(
    request: Request,
    candidate: Candidate,
    inner: Inner,
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
) -> tuple[StageBytes, ...]:
    pp, precision, found = candidate.pp, request.precision, []
    for rank in range(pp):
        virtual = range(rank, pp * candidate.vpp, pp)
        parameters, blocks, largest = Parameters(), [], 0
        for stage in virtual:
            first, last = bounds[stage], bounds[stage + 1]
            parameters.add(request, inner, first, last)
            segments = request.model.segments[first:last]
            largest = max([largest, *(sum(inner.local_parameters[s.block]) for s in segments)])
            blocks += [
                inner.costs[s.block, mode].memory
                for s, mode in zip(segments, modes[stage], strict=True)
            ]
        state = rank_state(precision, candidate, sum(parameters.dense.values()))
        if parameters.experts:
            elements = sum(parameters.experts.values())
            state += state_bytes(elements, precision, candidate.zero, candidate.expert_shards)
        gather = gather_bytes(largest, precision, candidate.zero, candidate.shards)
        found.append(stage_bytes(state, blocks, in_flight(candidate, rank), gather))
    return tuple(found)


def rank_state(precision: Precision, candidate: Candidate, parameters: int) -> StateBytes:
    """Weights, gradients and optimizer state of so many parameters of dense layers."""
    return state_bytes(parameters, precision, candidate.zero, candidate.shards)


def in_flight(candidate: Candidate, rank: int) -> float:
    """Microbatches whose activations a rank holds at once, of its whole share of the model."""
    pp, m, v = candidate.pp, candidate.microbatches, candidate.vpp
    if candidate.schedule == "gpipe":
        return m
    if v == 1:
        return min(m, pp - rank)
    # interleaved: 2·(pp - rank - 1) + (v - 1)·pp + 1 virtual stages (arXiv:2205.05198, appendix A)
    return min(m * v, 2 * (pp - rank - 1) + (v - 1) * pp + 1) / v
