"""Bytes of every pipeline rank: parameter state, activations in flight, buffers.

What `plan` and `predict` compare with the memory of a device; the parts come from the cost model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from ..costmodel.memory import (
    StageBytes,
    StateBytes,
    flat_buffer_bytes,
    gather_bytes,
    stage_bytes,
    state_bytes,
)
from ..costmodel.offload import can_offload
from ..costmodel.precision import Precision
from ..costmodel.runtime import Runtime
from ..costmodel.shards import local_shape
from ..costmodel.zero import ZeroShards
from ..ir.mesh import Mesh
from ..ir.optable import TABLE
from ..ir.plan import Recompute
from .candidates import OUTPUTS_OF_EXPERTS, Candidate, placement_of
from .inner import Inner
from .request import Request

Shapes = Mapping[tuple[int, int], int]
"""Products' weights: (outputs, inputs) → elements."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements that a rank computes with, of dense layers and of experts, which have different
    copies to be kept equal. `tied` are those of parameters that the model uses several times, by
    name (elements, whether of an expert): they count once on a rank.
    """

    dense_once: int = 0
    experts_once: int = 0
    tied: Mapping[str, tuple[int, bool]] = field(default_factory=dict)

    @staticmethod
    def of(request: Request, inner: Inner, first: int, last: int) -> Parameters:
        """Those of segments first ... last-1."""
        model, dense, experts = request.model, 0, 0
        tied: dict[str, tuple[int, bool]] = {}
        whole = (first, last) == (0, len(model.segments))
        counts = model.counts if whole else Counter(s.block for s in model.segments[first:last])
        for block, count in counts.items():
            each = inner.parameters_of(model.blocks[block], block)
            dense, experts = dense + count * each[0], experts + count * each[1]
        for segment in model.segments[first:last] if model.tied else ():
            inside, sizes = (
                inner.expert_parameters[segment.block],
                inner.local_parameters[segment.block],
            )
            own = model.blocks[segment.block].parameters
            for outer, name, size in zip(segment.parameters, own, sizes, strict=True):
                if outer in model.tied:
                    tied[outer] = size, name in inside
                    experts -= size * (name in inside)
                    dense -= size * (name not in inside)
        return Parameters(dense, experts, tied)

    def __or__(self, other: Parameters) -> Parameters:
        """Those of both on one rank."""
        return Parameters(
            self.dense_once + other.dense_once,
            self.experts_once + other.experts_once,
            {**self.tied, **other.tied},
        )

    @property
    def dense(self) -> int:
        return self.dense_once + sum(n for n, expert in self.tied.values() if not expert)

    @property
    def experts(self) -> int:
        return self.experts_once + sum(n for n, expert in self.tied.values() if expert)

    @property
    def elements(self) -> int:
        return self.dense + self.experts

    def sharded(self, candidate: Candidate) -> float:
        """Elements whose optimizer state a rank has."""
        if candidate.zero == 0:
            return self.elements
        return (
            self.dense / candidate.shards.optimizer
            + self.experts / candidate.expert_shards.optimizer
        )


def rank_bytes(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
) -> tuple[StageBytes, ...]:
    """Peak memory of every pipeline rank, by kind.

    `inners` are the insides of blocks as each pipeline rank has them, `bounds` cut the segments
    into pp x vpp virtual stages in order of the model, `modes` are the recompute modes of each
    one's segments.
    """
    placement = placement_of(candidate)
    stages_of: list[list[int]] = [[] for _ in range(candidate.pp)]
    for stage, rank in enumerate(placement):
        stages_of[rank].append(stage)
    shapes: dict[int, Mapping[str, Shapes]] = {}
    known: dict[Hashable, StageBytes] = {}
    found = []
    for rank, (stages, inner) in enumerate(zip(stages_of, inners, strict=True)):
        last = len(placement) - 1 in stages
        content = [
            (segment.block, mode, *(p for p in segment.parameters if p in request.model.tied))
            for stage in stages
            for segment, mode in zip(
                request.model.segments[bounds[stage] : bounds[stage + 1]],
                modes[stage],
                strict=True,
            )
        ]
        sizes = tuple(bounds[stage + 1] - bounds[stage] for stage in stages)
        key = (tuple(content), sizes, in_flight(candidate, rank), last, id(inner))
        if key not in known:
            if id(inner) not in shapes:
                shapes[id(inner)] = {
                    block: _product_shapes(request, candidate, inner, block)
                    for block in request.model.blocks
                } if request.runtime.placeholder_gradients else {}  # fmt: skip
            known[key] = _one_rank(
                request, candidate, inner, rank, stages, bounds, modes, shapes[id(inner)]
            )
        found.append(known[key])
    return tuple(found)


def _one_rank(
    request: Request,
    candidate: Candidate,
    inner: Inner,
    rank: int,
    stages: Sequence[int],
    bounds: Sequence[int],
    modes: Sequence[Sequence[Recompute]],
    shapes: Mapping[str, Shapes],
) -> StageBytes:
    model, device = request.model, inner.cluster.device
    parameters, calls, outputs = Parameters(), [], 0
    used: set[str] = set()
    for stage in stages:
        first, last = bounds[stage], bounds[stage + 1]
        segments = model.segments[first:last]
        parameters |= Parameters.of(request, inner, first, last)
        used |= {segment.block for segment in segments}
        calls += [
            inner.costs[s.block, mode].memory
            for s, mode in zip(segments, modes[stage], strict=True)
        ]
        if calls and stage < candidate.pp * candidate.vpp - 1:
            outputs += calls[-1].output
    buffers = gathered_bytes(request, candidate, inner, used)
    buffers += _flat_buffers(request, candidate, parameters)
    if request.runtime.placeholder_gradients:
        distinct = {shape: n for block in used for shape, n in shapes[block].items()}
        buffers += sum(distinct.values()) * request.precision.compute_bytes
    return stage_bytes(
        held_state(request, candidate, parameters.dense, parameters.experts),
        calls,
        in_flight(candidate, rank),
        buffers,
        outputs=outputs if request.runtime.keeps_outputs and candidate.pp > 1 else 0,
        reserve=device.reserve_bytes + request.runtime.reserve_bytes,
    )


def host_room(inner: Inner) -> float:
    """Bytes of host memory for a rank's activations; inf where no device offloads any."""
    device = inner.cluster.device
    return float(device.host_memory_bytes or 0) if can_offload(device) else float("inf")


def fits(memory: StageBytes, inner: Inner) -> bool:
    """Whether a rank's bytes fit its device, and host memory."""
    limit = inner.cluster.device.memory_limit_bytes
    return memory.total <= limit and memory.host <= host_room(inner)


def held_state(request: Request, candidate: Candidate, dense: int, experts: int) -> StateBytes:
    """Weights, gradients and optimizer state of so many parameters of dense layers and experts."""
    state = rank_state(request.precision, candidate, dense, request.runtime)
    if experts:
        state += _state(
            request.precision, candidate, experts, request.runtime, candidate.expert_shards
        )
    return replace(state, optimizer=0) if request.optimizer_on_host else state


def rank_state(
    precision: Precision, candidate: Candidate, parameters: int, runtime: Runtime | None = None
) -> StateBytes:
    """Weights, gradients and optimizer state of so many parameters of dense layers."""
    return _state(precision, candidate, parameters, runtime, candidate.shards)


def _state(
    precision: Precision,
    candidate: Candidate,
    parameters: int,
    runtime: Runtime | None,
    shards: ZeroShards,
) -> StateBytes:
    gradient_bytes = None if runtime is None else _accumulated_bytes(precision, candidate, runtime)
    return state_bytes(parameters, precision, candidate.zero, shards, gradient_bytes=gradient_bytes)


def _accumulated_bytes(precision: Precision, candidate: Candidate, runtime: Runtime) -> int:
    """Bytes of an accumulated gradient. Products that add to it themselves do so in float32
    (Megatron-LM's wgrad_gemm_accum_fp32), and FSDP's shards have the dtype of its float32
    parameters, whatever gradients are reduced in."""
    sharded = candidate.zero == 3 and not runtime.flat_optimizer
    if runtime.gradient_bytes is None or runtime.fused_accumulation or sharded:
        return precision.gradient_bytes
    return runtime.gradient_bytes


def gathered_bytes(
    request: Request, candidate: Candidate, inner: Inner, blocks: Iterable[str]
) -> int:
    """Buffers of the block that needs most; experts have fewer copies to share their state."""

    def of_block(block: str) -> int:
        dense, experts = inner.parameters_of(request.model.blocks[block], block)
        return sum(
            gather_bytes(
                elements, request.precision, candidate.zero, shards,
                gradient_bytes=request.runtime.gradient_bytes,
            )
            for elements, shards in (
                (dense, candidate.shards),
                (experts, candidate.expert_shards),
            )
        )  # fmt: skip

    return max(map(of_block, blocks), default=0)


def _flat_buffers(request: Request, candidate: Candidate, parameters: Parameters) -> int:
    if not request.runtime.flat_optimizer:
        return 0
    groups = (
        (parameters.dense, candidate.shards),
        (parameters.experts, candidate.expert_shards),
    )
    accumulated = _accumulated_bytes(request.precision, candidate, request.runtime)
    return sum(
        flat_buffer_bytes(
            elements, request.precision, accumulated, candidate.zero, shards.optimizer
        )
        for elements, shards in groups
        if elements
    )


def _product_shapes(
    request: Request, candidate: Candidate, inner: Inner, block: str
) -> dict[tuple[int, int], int]:
    """Weights of a block's products on one rank, by shape; products of the same input are one
    (queries, keys and values; gate and up), and so are all experts."""
    graph, types = request.model.blocks[block], inner.annotations[block]
    mesh, kinds = Mesh(inner.axes), dict(zip(graph.parameters, types.parameters, strict=True))
    joint: dict[str, list[tuple[int, int]]] = {}
    for op in graph.ops:
        if TABLE[op.kind].work != "contraction" or op.operands[1] not in kinds:
            continue
        weight = op.operands[1]
        if weight in inner.expert_parameters[block]:
            sizes = graph.values[weight].shape({})
            outputs = OUTPUTS_OF_EXPERTS[op.kind]
            shape = (sizes[outputs] // candidate.etp, sizes[3 - outputs])
        else:
            outside, inside = local_shape(graph.values[weight], kinds[weight], mesh, {})
            shape = (inside, outside) if op.kind == "linear_io" else (outside, inside)
        joint.setdefault(op.operands[0], []).append(shape)
    shapes = {(sum(out for out, _ in same), same[0][1]) for same in joint.values()}
    return {shape: prod(shape) for shape in shapes}


def in_flight(candidate: Candidate, rank: int) -> float:
    """Microbatches whose activations a rank holds at once, of its whole share of the model."""
    return in_flight_by_rank(candidate)[rank]


def in_flight_by_rank(candidate: Candidate) -> tuple[float, ...]:
    """The same of every pipeline rank; what only waits for gradients of weights counts whole. 1F1B
    holds what passes the ranks behind it, zero-bubble schedules as much on every rank (read off
    their tables: `tests/test_footprint.py`)."""
    pp, m, v = candidate.pp, candidate.microbatches, candidate.vpp
    ranks = range(pp)
    if candidate.schedule == "gpipe":
        return (m,) * pp
    if candidate.schedule == "zb-h1":
        return (min(m, pp),) * pp
    if candidate.schedule == "zb-v":
        return tuple(min(pp, m, (m + 1 + rank) / 2) for rank in ranks)
    if v == 1:
        return tuple(min(m, pp - rank) for rank in ranks)
    # interleaved: 2·(pp - rank - 1) + (v - 1)·pp + 1 virtual stages (arXiv:2205.05198, appendix A)
    return tuple(min(m * v, 2 * (pp - rank - 1) + (v - 1) * pp + 1) / v for rank in ranks)
