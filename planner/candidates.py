"""The configurations that the search looks at: degrees that multiply to the cluster and divide the
batch, and for each set of degrees the schedules and the ways to share state out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

from ..costmodel.collectives import Group, collective_seconds
from ..ir import InvalidInput
from ..ir.graph import Model, bind
from ..ir.optable import TABLE
from ..ir.plan import ScheduleName, Strategy
from ..ir.schedule_rows import schedule_placement
from .request import Request, pinned_stages, repeated

MAX_MICRO_BATCH = 16
MAX_MICRO_TOKENS = 65536
"""Sequences per microbatch, and tokens where sequences are short, beyond which the search does not
go unless told to: kernels have long reached their peak, and activations only grow."""
LEAST_TOKENS = 1024
"""Tokens of a sequence that a rank keeps at least: the search goes no further with context
parallelism unless told to."""
MOST_VIRTUAL_STAGES = 8
"""Virtual stages of a rank up to which the search goes unless told to: each sends every microbatch
once more."""
SLOW_LINKS = 0.1
"""Of a stage's work: from here on what stages hand on can keep them waiting, and GPipe is looked at
beside 1F1B."""


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One configuration; how stages are cut and what is recomputed follows from it.

    Ranks are laid out tp innermost, then cp, dp and pp; experts are split over `ep` x `etp` of the
    dp x cp x tp ranks of a stage, `ep` over neighbouring ones first. `zero_group` is how many
    data-parallel ranks (dp x cp) ZeRO splits state over, neighbours (0: all). Of the cp ranks of a
    sequence `ulysses` neighbouring ones exchange sequence for heads, the others pass keys and
    values round (arXiv:2405.07719).
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
    ulysses: int = 1

    @property
    def key(self) -> str:
        text = f"pp={self.pp} dp={self.dp} tp={self.tp} zero={self.zero}"
        for name in ("vpp", "cp", "ulysses", "ep", "etp"):
            if getattr(self, name) > 1:
                text += f" {name}={getattr(self, name)}"
        if self.zero_group:
            text += f" zero_group={self.zero_group}"
        if self.schedule not in ("1f1b", "interleaved"):
            text += f" schedule={self.schedule}"
        return f"{text} micro_batch={self.micro_batch}"

    @property
    def ring(self) -> int:
        """Ranks of a context-parallel group between which keys and values travel."""
        return self.cp // self.ulysses

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
    """All configurations to consider, in a fixed order. Raises InvalidInput, saying why, where
    there is none."""
    found = [each for head in heads(request) for each in variants(request, head)]
    if not found:
        raise InvalidInput(_why_none(request))
    return found


def heads(request: Request) -> list[Candidate]:
    """One configuration for every set of degrees and micro-batch, in a fixed order: 1F1B without
    ZeRO, which `variants` varies. Raises InvalidInput where there is none."""
    found = list(_heads(request))
    if not found:
        raise InvalidInput(_why_none(request))
    return found


def variants(request: Request, head: Candidate) -> list[Candidate]:
    """The schedules, and the ways to share state out, of one set of degrees."""
    return [
        replace(head, schedule=schedule, vpp=vpp, zero=zero, zero_group=group)
        for schedule, vpp in schedules(request, head)
        for zero, group in _zero_stages(request, head)
    ]


def allowed(request: Request, head: Candidate, anything: bool) -> list[Candidate]:
    """The variants that count."""
    return [each for each in variants(request, head) if counts(each, anything)]


def counts(candidate: Candidate, anything: bool) -> bool:
    """Whether a candidate is one of those that are looked for: all, or what a backend emits."""
    return anything or unemittable(candidate) is None


def emits(model: Model) -> bool:
    """Whether a backend can emit the model at all: mixtures of experts are planned and predicted
    from their dimensions, not yet traced."""
    return expert_sizes_of(model) is None


def unemittable(candidate: Candidate | Strategy) -> str | None:
    """What of a configuration no backend emits yet, or None."""
    parts = [
        (candidate.vpp > 1 or candidate.schedule not in ("1f1b", "gpipe"),
         "interleaved and zero-bubble schedules"),
        (candidate.cp > 1, "context parallelism"),
        (candidate.ep * candidate.etp > 1, "expert parallelism"),
        (candidate.zero_group > 0, "ZeRO over a part of the data-parallel ranks"),
    ]  # fmt: skip
    return ", ".join(name for used, name in parts if used) or None


def most_devices(request: Request) -> int:
    """Devices beyond which there is no configuration: pp·dp is at most the sequences of a batch."""
    return request.workload.global_batch * (request.fix.tp or _widest(request))


def _widest(request: Request) -> int:
    """The largest tp that is looked at unless it is fixed: a node, or 8 of smaller nodes."""
    return max(8, request.cluster.devices_per_node)


def _heads(request: Request) -> Iterator[Candidate]:
    fix, cluster = request.fix, request.cluster
    world, batch = cluster.world_size, request.workload.global_batch
    layers = repeated(request.model).count
    widest = _widest(request)
    whole = request.whole_batch() is not None
    pinned = max((stage for stage in pinned_stages(request.model) if stage is not None), default=0)
    stages = len(fix.stages) // (fix.vpp or 1) if fix.stages else None
    attention, experts = attention_heads(request.model), expert_sizes_of(request.model)
    for pp in divisors(world):
        if fix.pp not in (None, pp) or stages not in (None, pp):
            continue
        if pp <= pinned or pp > len(request.model.segments) or (pp > layers and fix.pp is None):
            continue
        for tp in divisors(world // pp):
            if fix.tp not in (None, tp) or (fix.tp is None and tp > widest):
                continue
            for cp, ulysses in _contexts(request, world // pp // tp, tp, attention):
                dp = world // pp // tp // cp
                if fix.dp not in (None, dp) or batch % dp:
                    continue
                micros = [batch // dp] if whole else _micro_batches(request, batch // dp)
                for micro in micros:
                    microbatches = batch // dp // micro
                    if microbatches < pp or (whole and dp > 1):
                        continue
                    for ep, etp in _experts(request, dp * cp * tp, tp, experts):
                        yield Candidate(pp, dp, tp, 0, micro, microbatches, cp=cp, ep=ep, etp=etp,
                                        ulysses=ulysses)  # fmt: skip


def _micro_batches(request: Request, per_rank: int) -> list[int]:
    fixed = request.fix.micro_batch
    if fixed is not None:
        return [fixed] if per_rank % fixed == 0 else []
    most = max(MAX_MICRO_BATCH, MAX_MICRO_TOKENS // request.workload.seq_len)
    return [d for d in divisors(per_rank) if d <= most]


def _contexts(
    request: Request, ranks: int, tp: int, attention: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """(cp, ulysses): nothing, a ring, heads exchanged as far as key-value heads go."""
    fix, tokens = request.fix, request.workload.seq_len
    for cp in divisors(ranks):
        if fix.cp not in (None, cp):
            continue
        if cp == 1:
            yield 1, 1
            continue
        if tokens % (cp * tp) or (fix.cp is None and tokens // cp < LEAST_TOKENS):
            continue
        if not attention:
            continue
        most = cp
        for count, shared in attention:
            most = gcd(most, gcd(count, shared) // gcd(gcd(count, shared), tp))
        if fix.attention in (None, "ring"):
            yield cp, 1
        if most > 1 and fix.attention in (None, "ulysses"):
            yield cp, most


def _experts(
    request: Request, ranks: int, tp: int, experts: tuple[int, int] | None
) -> Iterator[tuple[int, int]]:
    """(ep, etp) over the ranks of a stage."""
    fix = request.fix
    if experts is None:
        if fix.ep in (None, 1) and fix.etp in (None, 1):
            yield 1, 1
        return
    count, width = experts
    for ep in divisors(gcd(count, ranks)):
        for etp in dict.fromkeys((1, tp) if fix.etp is None else (fix.etp,)):
            if fix.ep in (None, ep) and ranks % (ep * etp) == 0 and width % etp == 0:
                yield ep, etp


def schedules(request: Request, head: Candidate) -> Iterator[tuple[ScheduleName, int]]:
    """Schedules with their virtual stages per rank that the layers and microbatches allow."""
    fix, layers = request.fix, repeated(request.model).count
    m, pp = head.microbatches, head.pp
    every: list[tuple[ScheduleName, int]] = [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1)]
    every += [("interleaved", v) for v in range(2, layers // pp + 1)]
    if 2 * pp <= layers + 2:
        every.append(("zb-v", 2))
    for schedule, vpp in every:
        if fix.schedule is None and pp == 1 and schedule != "1f1b":
            continue
        if fix.schedule is None and schedule == "gpipe" and not _waits_for_links(request, head):
            continue  # it takes as long as 1F1B and holds more
        if fix.schedule not in (None, schedule) or fix.vpp not in (None, vpp):
            continue
        if fix.vpp is None and schedule == "interleaved" and (
            vpp > MOST_VIRTUAL_STAGES or m % max(1, m // pp)
        ):  # fmt: skip
            continue
        if vpp > 1 and any(pin.target == "stage" for pin in request.model.pins):
            continue
        yield schedule, vpp


def _waits_for_links(request: Request, head: Candidate) -> bool:
    """Whether handing an activation on and its gradient back takes so long beside a stage's work
    on a microbatch that it pays to have more of them under way than 1F1B has: `SLOW_LINKS` of the
    FLOPs at the device's peak."""
    model, workload = request.model, request.workload
    graph = model.blocks[model.segments[repeated(model).first].block]
    binding = {"b": head.micro_batch, "s": workload.seq_len // head.cp}
    elements = max(prod(graph.values[name].shape(binding)) for name in graph.outputs)
    carried = elements * request.precision.compute_bytes / head.tp
    sent = collective_seconds(request.cluster, "send", carried, head.pipe)
    step = request.least_flops_per_step / request.peak_flops_per_s
    return 2 * sent > SLOW_LINKS * step / head.microbatches


def _zero_stages(request: Request, head: Candidate) -> Iterator[tuple[int, int]]:
    """(ZeRO stage, ranks it splits over: 0 for all). Groups are those that fit a level of the
    cluster, so that what is gathered often stays on faster links (arXiv:2312.12705)."""
    fix, replicas = request.fix, head.replicas
    stages = [0, 1, 2, 3] if fix.zero is None else [fix.zero]
    if fix.zero is None and replicas == 1 and head.expert_replicas == 1:
        stages = [0]
    groups = [0]
    if fix.zero_group is not None:
        groups = [fix.zero_group]
    else:
        for level in request.cluster.levels[:-1]:
            inside = level.span_devices // head.tp
            if 1 < inside < replicas and replicas % inside == 0:
                groups.append(inside)
    for zero in stages:
        for group in groups if zero else [0]:
            if group == 0 or replicas % group == 0:
                yield zero, group


def attention_heads(model: Model) -> list[tuple[int, int]]:
    """(query, key-value) heads of every attention of the model's blocks."""
    found: dict[tuple[int, int], None] = {}
    for graph in model.blocks.values():
        for op in graph.ops:
            if TABLE[op.kind].work == "attention":
                counts = [prod(bind(op.sizes[f], {}) for f in op.rule.operands[k][1])
                          for k in (0, 1)]  # fmt: skip
                found[counts[0], counts[1]] = None
    return list(found)


def expert_sizes_of(model: Model) -> tuple[int, int] | None:
    """(experts, outputs of one) that every mixture of the model has a multiple of; None for a model
    without experts."""
    counts, widths = 0, 0
    for graph in model.blocks.values():
        for op in graph.ops:
            if op.kind == "grouped_linear":
                count, width = (
                    prod(bind(op.sizes[f], {}) for f in op.rule.operands[1][dim]) for dim in (0, 1)
                )
                counts, widths = gcd(counts, count), gcd(widths, width)
    return (counts, widths) if counts else None


def _why_none(request: Request) -> str:
    if reason := request.whole_batch():
        return f"{reason}; only dp=1 with the whole batch as one microbatch is left, and that fails"
    fix, world, batch = request.fix, request.cluster.world_size, request.workload.global_batch
    fixed = f" with {fix}" if str(fix) != "nothing" else ""
    segments = len(request.model.segments)
    if fix.pp and fix.pp > segments:
        return f"--fix: pp={fix.pp} stages, but the model has only {segments} pieces to share out"
    if (fix.ep or 1) * (fix.etp or 1) > 1:
        sizes = expert_sizes_of(request.model)
        if sizes is None:
            return f"--fix: ep={fix.ep or 1}, etp={fix.etp or 1}, but the model has no experts"
        if sizes[0] % (fix.ep or 1) or sizes[1] % (fix.etp or 1):
            return (
                f"--fix: ep={fix.ep or 1}, etp={fix.etp or 1}: the model has {sizes[0]} experts of "
                f"{sizes[1]} outputs, which these do not divide"
            )
    if (fix.cp or 1) > 1 and (reason := _no_context(request)):
        return f"--fix: cp={fix.cp}: {reason}"
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


def _no_context(request: Request) -> str | None:
    """Why a sequence cannot be shared out as it is fixed, or None where it can."""
    fix, tokens = request.fix, request.workload.seq_len
    if not attention_heads(request.model):
        return "the model has no attention that shares a sequence out"
    if tokens % ((fix.cp or 1) * (fix.tp or 1)):
        return f"seq_len {tokens} does not divide by cp*tp = {(fix.cp or 1) * (fix.tp or 1)}"
    if fix.attention not in (None, "ring", "ulysses"):
        return f"attention={fix.attention} is not planned yet, expected ring or ulysses"
    if fix.attention == "ulysses":
        return f"key-value heads do not divide by cp*tp = {fix.cp}*{fix.tp or 1}"
    return None
