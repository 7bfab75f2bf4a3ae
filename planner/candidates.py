"""The configurations that the search looks at: degrees that multiply to the cluster and divide the
batch, within the limits of the engine that will run them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..costmodel.collectives import Group
from ..ir import InvalidInput
from ..ir.plan import ScheduleName
from ..ir.schedule_rows import schedule_placement
from .request import Request, pinned_stages, repeated

MAX_MICRO_BATCH = 16
"""Sequences per microbatch beyond which the search does not go unless told to: kernels have long
reached their peak, and activations only grow."""


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One configuration; how stages are cut and what is recomputed follows from it.

    Ranks are laid out tp innermost, then cp, dp and pp; experts are split over `ep` x `etp` of the
    dp x cp x tp ranks of a stage, `ep` over neighbouring ones first. `zero_group` is how many
    data-parallel ranks (dp x cp) ZeRO splits state over, neighbours (0: all).
    """

    pp: int
    dp: int
    tp: int
    zero: int
    micro_batch: int
    microbatches: int
    schedule: ScheduleName = "1f1b"
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    zero_group: int = 0

    @property
    def key(self) -> str:
        return (
            f"pp={self.pp} dp={self.dp} tp={self.tp} zero={self.zero} "
            f"micro_batch={self.micro_batch}"
        )

    @property
    def ranks(self) -> int:
        """Devices of the job."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters: the data-parallel group of dense layers."""
        return self.dp * self.cp

    @property
    def shards(self) -> int:
        """Ranks that ZeRO splits the state of dense layers over."""
        return self.zero_group or self.replicas

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def expert_shards(self) -> int:
        """Ranks that ZeRO splits the state of experts over."""
        return min(self.expert_replicas, self.zero_group or self.expert_replicas)

    @property
    def expert_data(self) -> Group:
        """The group over which gradients of experts are reduced."""
        return Group(self.expert_replicas, self.ep * self.etp)

    @property
    def data(self) -> Group:
        """The group over which gradients of dense layers are reduced."""
        return Group(self.replicas, self.tp)

    @property
    def pipe(self) -> Group:
        """The group of a pipeline's ranks."""
        return Group(self.pp, self.dp * self.cp * self.tp)


def placement_of(candidate: Candidate) -> tuple[int, ...]:
    """The pipeline rank of every virtual stage."""
    return schedule_placement(
        candidate.schedule, candidate.pp, candidate.microbatches, candidate.vpp
    )


def divisors(number: int) -> list[int]:
    """Divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def candidates(request: Request) -> list[Candidate]:
    """All configurations to consider, in a fixed order.

    The pipelining engine runs 1F1B with at least as many microbatches as stages. Raises
    InvalidInput, saying why, where there is none.
    """
    found = list(_enumerate(request))
    if not found:
        raise InvalidInput(_why_none(request))
    return found


def most_devices(request: Request) -> int:
    """Devices beyond which there is no configuration: pp·dp is at most the sequences of a batch."""
    return request.workload.global_batch * (request.fix.tp or _widest(request))


def _widest(request: Request) -> int:
    """The largest tp that is looked at unless it is fixed: a node, or 8 of smaller nodes."""
    return max(8, request.cluster.devices_per_node)


def _enumerate(request: Request) -> Iterator[Candidate]:
    fix, cluster = request.fix, request.cluster
    world, batch = cluster.world_size, request.workload.global_batch
    layers = repeated(request.model).count
    widest = _widest(request)
    whole = request.whole_batch() is not None
    pinned = max((stage for stage in pinned_stages(request.model) if stage is not None), default=0)
    for pp in divisors(world):
        if fix.pp not in (None, pp) or (fix.stages and len(fix.stages) != pp):
            continue
        if pp <= pinned or pp > len(request.model.segments) or (pp > layers and fix.pp is None):
            continue
        for tp in divisors(world // pp):
            if fix.tp not in (None, tp) or (fix.tp is None and tp > widest):
                continue
            dp = world // pp // tp
            if fix.dp not in (None, dp) or batch % dp:
                continue
            for micro in [batch // dp] if whole else _micro_batches(request, batch // dp):
                microbatches = batch // dp // micro
                if microbatches < pp or (whole and dp > 1):
                    continue
                for zero in _zero_stages(request, dp):
                    schedule: ScheduleName = "gpipe" if fix.schedule == "gpipe" else "1f1b"
                    yield Candidate(pp, dp, tp, zero, micro, microbatches, schedule)


def _micro_batches(request: Request, per_rank: int) -> list[int]:
    fixed = request.fix.micro_batch
    if fixed is not None:
        return [fixed] if per_rank % fixed == 0 else []
    return [d for d in divisors(per_rank) if d <= MAX_MICRO_BATCH]


def _zero_stages(request: Request, dp: int) -> list[int]:
    if request.fix.zero is not None:
        return [request.fix.zero]
    return [0] if dp == 1 else [0, 1, 2, 3]


def _why_none(request: Request) -> str:
    if reason := request.whole_batch():
        return f"{reason}; only dp=1 with the whole batch as one microbatch is left, and that fails"
    fix, world, batch = request.fix, request.cluster.world_size, request.workload.global_batch
    fixed = f" with {fix}" if str(fix) != "nothing" else ""
    segments = len(request.model.segments)
    if fix.pp and fix.pp > segments:
        return f"--fix: pp={fix.pp} stages, but the model has only {segments} pieces to share out"
    for pin in request.model.pins:
        if pin.stage >= (fix.pp or world):
            return f"pin {pin.name}: stage={pin.stage}, but there are only {fix.pp or world} stages"
    tried = sorted(
        {
            world // pp // tp
            for pp in divisors(world)
            for tp in divisors(world // pp)
            if fix.pp in (None, pp) and fix.tp in (None, tp) and fix.dp in (None, world // pp // tp)
        }
    )
    if tried and all(batch % dp for dp in tried):
        return (
            f"global batch {batch} cannot be divided over {world} devices{fixed}: data-parallel "
            f"degrees {tried[:8]} do not divide it; choose a multiple of {tried[0]}"
        )
    if fix.micro_batch:
        return (
            f"--fix: micro_batch={fix.micro_batch} does not divide what a data-parallel rank gets "
            f"of global batch {batch}, or leaves fewer microbatches than pipeline stages"
        )
    return (
        f"global batch {batch} leaves fewer microbatches than pipeline stages on {world} "
        f"devices{fixed}: 1F1B needs at least pp microbatches; use a larger batch"
    )
