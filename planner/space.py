"""The configurations that the search looks at: degrees that multiply to the cluster and divide the
batch, and for each set of degrees the schedules and the ways to share state out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import gcd, prod

from ..costmodel.collectives import collective_seconds
from ..costmodel.memory import state_bytes
from ..ir import InvalidInput
from ..ir.plan import ScheduleName
from .candidates import (
    Candidate,
    attention_heads,
    divisors,
    expert_sizes_of,
    unemittable,
)
from .fix import Fix
from .request import Request, pinned_stages, repeated

MAX_MICRO_BATCH = 16
MAX_MICRO_TOKENS = 65536
"""Sequences per microbatch, and tokens where sequences are short, beyond which the search does not
go unless told to: kernels have long reached their peak, and activations only grow."""
LEAST_TOKENS = 1024
"""Tokens of a sequence that a rank keeps at least: the search goes no further with context
parallelism unless told to."""
CROWDED = 0.5
"""Of a device's memory: what ZeRO-1 over all replicas keeps at least for the search to split
gradients over fewer ranks than the optimizer's state. Where it keeps less there is room for whole
gradients, which are reduced once a step."""
MOST_VIRTUAL_STAGES = 8
"""Virtual stages of a rank up to which the search goes unless told to: each sends every microbatch
once more."""
SLOW_LINKS = 0.1
"""Of a stage's work: from here on what stages hand on can keep them waiting, and GPipe is looked at
beside 1F1B."""


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
    found = [each for head in _heads(request) for each in _changed(request, head)]
    if not found:
        raise InvalidInput(_why_none(request))
    return found


def _changed(request: Request, head: Candidate) -> Iterator[Candidate]:
    """A set of degrees with and without the changes of layers that are allowed, where tensor
    parallelism makes them worth something."""
    yield head
    allow = request.allow
    for parallel, ladder in ((True, False), (False, True), (True, True)):
        asked = (allow.parallel_block or not parallel) and (allow.ladder_residual or not ladder)
        if asked and head.tp > 1:
            yield replace(head, parallel_block=parallel, ladder_residual=ladder)


def variants(request: Request, head: Candidate) -> list[Candidate]:
    """The schedules, and the ways to share state out, of one set of degrees."""
    shared = [
        replace(head, zero=zero, zero_group=group, gradient_group=gradients, parameter_group=params)
        for zero, (group, gradients, params) in zero_stages(request, head)
    ]
    every = request.allow.local_update
    if every and head.cp == 1 and expert_sizes_of(request.model) is None:
        shared += [replace(each, local_update=every) for each in shared if _apart(each)]
    return [
        replace(each, schedule=schedule, vpp=vpp)
        for schedule, vpp in schedules(request, head)
        for each in shared
    ]


def _apart(candidate: Candidate) -> bool:
    """Whether there are replicas that can train apart: no state is shared out over all of them."""
    if candidate.gradient_group or candidate.parameter_group:
        return False
    together = candidate.zero_group if candidate.zero else 1
    return 0 < together < candidate.replicas


def allowed(request: Request, head: Candidate, anything: bool) -> list[Candidate]:
    """The variants that count."""
    return [each for each in variants(request, head) if counts(each, anything)]


def counts(candidate: Candidate, anything: bool) -> bool:
    """Whether a candidate is one of those that are looked for: all, or what a backend emits."""
    return anything or unemittable(candidate) is None


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
            if fix.attention in (None, "heads"):
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


def zero_stages(request: Request, head: Candidate) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(ZeRO stage, `ZERO_GROUPS`). Groups are those that fit a level of the cluster, so that what
    is gathered often stays on faster links (arXiv:2312.12705), nested; only those of states that
    the stage splits differ from the largest. Gradients get a smaller group than the optimizer's
    state only where memory is `CROWDED`, unless that is fixed."""
    fix, replicas = request.fix, head.replicas
    stages = [0, 1, 2, 3] if fix.zero is None else [fix.zero]
    if fix.zero is None and replicas == 1 and head.expert_replicas == 1:
        stages = [0]
    inside = [level.span_devices // head.tp for level in request.cluster.levels[:-1]]
    sizes = [size for size in dict.fromkeys(inside)
             if 1 < size < replicas and replicas % size == 0]  # fmt: skip
    # of a model with experts these are nearly all
    share = request.model.elements // (head.pp * max(head.tp, head.ep * head.etp))
    kept = state_bytes(share, request.precision, 1, replicas).total
    crowded = kept >= CROWDED * request.limit_bytes
    for zero in stages:
        if zero == 0:
            yield 0, (0, 0, 0)
            continue
        for optimizer in [0, *sizes] if fix.zero_group is None else [fix.zero_group]:
            whole = optimizer or replicas
            if replicas % whole:
                continue
            smaller = sizes if crowded else []
            for gradients in _inner_groups(fix.gradient_group, fix, smaller, whole, zero >= 2):
                most = gradients or whole
                for parameters in _inner_groups(fix.parameter_group, fix, sizes, most, zero == 3):
                    yield zero, (optimizer, gradients, parameters)


def _inner_groups(
    given: int | None, fix: Fix, sizes: Sequence[int], most: int, split: bool
) -> list[int]:
    """Groups inside one of `most` ranks: 0, the same one, and those of `sizes` that divide it;
    where `zero_group` alone is fixed it is that of all states."""
    if given is not None:
        return [given if given < most else 0] if most % given == 0 and split else []
    alike = fix.zero_group is not None and fix.gradient_group is None is fix.parameter_group
    if alike or not split:
        return [0]
    return [0, *(size for size in sizes if size < most and most % size == 0)]


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
