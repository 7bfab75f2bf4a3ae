"""A configuration: degrees of parallelism and the choices beside them, and what of it can be
emitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import gcd, prod

from ..costmodel.collectives import Group
from ..costmodel.zero import ZeroShards
from ..ir.graph import Model, Op, bind
from ..ir.optable import TABLE
from ..ir.plan import MODEL_CHANGES, Recompute, ScheduleName, Strategy
from ..ir.schedule_rows import schedule_placement

ZERO_GROUPS = ("zero_group", "gradient_group", "parameter_group")
"""The ranks over which ZeRO splits optimizer state, gradients and parameters, from the largest."""


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One configuration; how stages are cut and what is recomputed follows from it.

    Ranks are laid out tp innermost, then cp, dp and pp; experts are split over `ep` x `etp` of the
    dp x cp x tp ranks of a stage, `ep` over neighbouring ones first. `zero_group` is how many
    data-parallel ranks (dp x cp) ZeRO splits state over, neighbours (0: all); gradients are split
    over `gradient_group` of these (0: as many) and parameters over `parameter_group` of those
    (0: as many). Of the cp ranks of a sequence `ulysses` neighbouring ones exchange sequence for
    heads, the others pass keys and values round (arXiv:2405.07719). The last three change the
    model (`allow`); with local updates replicas, or groups that share state out, train apart.
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
    gradient_group: int = 0
    parameter_group: int = 0
    parallel_block: bool = False
    ladder_residual: bool = False
    local_update: int = 0

    @property
    def key(self) -> str:
        text = f"pp={self.pp} dp={self.dp} tp={self.tp} zero={self.zero}"
        for name in ("vpp", "cp", "ulysses", "ep", "etp"):
            if getattr(self, name) > 1:
                text += f" {name}={getattr(self, name)}"
        for name in ZERO_GROUPS:
            if getattr(self, name):
                text += f" {name}={getattr(self, name)}"
        if self.schedule not in ("1f1b", "interleaved"):
            text += f" schedule={self.schedule}"
        for name in MODEL_CHANGES:
            if getattr(self, name):
                text += f" {name}={int(getattr(self, name))}"
        return f"{text} micro_batch={self.micro_batch}"

    def strategy(self, recompute: Recompute, layers: Sequence[int], sp: bool | None) -> Strategy:
        """In the names that scripts rely on, with the strongest recomputation in use, the layers
        of every pipeline rank, and sequence parallelism as it was asked for."""
        same = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "microbatches"}
        return Strategy(**same, recompute=recompute, layers=tuple(layers), sp=sp)

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
    def sharing(self) -> tuple[int, int, int, int, int]:
        """All that says how state is shared out and kept equal."""
        groups = self.zero_group, self.gradient_group, self.parameter_group
        return self.zero, *groups, self.local_update

    @property
    def shards(self) -> ZeroShards:
        """Ranks that ZeRO splits the state of dense layers over."""
        optimizer = self.zero_group or self.replicas
        gradients = self.gradient_group or optimizer
        return ZeroShards(self.parameter_group or gradients, gradients, optimizer)

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts."""
        return self.dp * self.cp * self.tp // (self.ep * self.etp)

    @property
    def expert_shards(self) -> ZeroShards:
        """Ranks that ZeRO splits the state of experts over: as many as for dense layers, as far as
        there are copies."""
        copies, dense = self.expert_replicas, self.shards
        optimizer = gcd(copies, self.zero_group) if self.zero_group else copies
        gradients = gcd(optimizer, dense.gradients) if self.gradient_group else optimizer
        parameters = gcd(gradients, dense.parameters) if self.parameter_group else gradients
        return ZeroShards(parameters, gradients, optimizer)

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


def emits(model: Model) -> bool:
    """Whether a backend can emit the model at all: mixtures of experts are planned and predicted,
    not yet emitted."""
    return all(
        op.kind != "top_k" and op.kind not in OUTPUTS_OF_EXPERTS
        for graph in model.blocks.values()
        for op in graph.ops
    )


def unemittable(candidate: Candidate | Strategy, backend: str = "torch") -> str | None:
    """What of a configuration a backend does not emit yet, or None."""
    parts = [
        (candidate.schedule == "interleaved" and backend != "jax",
         "interleaved schedules, but for jax"),
        (candidate.schedule.startswith("zb"), "zero-bubble schedules"),
        (candidate.cp > 1, "context parallelism"),
        (candidate.ep * candidate.etp > 1, "expert parallelism"),
        (any(getattr(candidate, name) for name in ZERO_GROUPS),
         "ZeRO over a part of the data-parallel ranks"),
        (isinstance(candidate, Strategy) and candidate.recompute == "offload",
         "offloaded activations"),
        (candidate.parallel_block, "parallel attention and MLP"),
        (candidate.ladder_residual, "ladder residuals"),
        (candidate.local_update > 0, "local updates"),
    ]  # fmt: skip
    return ", ".join(name for used, name in parts if used) or None


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
    for count, width in expert_products(model):
        counts, widths = gcd(counts, count), gcd(widths, width)
    return (counts, widths) if counts else None


OUTPUTS_OF_EXPERTS = {"grouped_linear": 1, "grouped_linear_io": 2}
"""Products of all experts → the dim of their weights that holds the outputs; dim 0 is experts."""


def expert_products(model: Model) -> list[tuple[int, int]]:
    """(experts, outputs of one) of every product of experts."""
    return [
        (_size(op, 0), _size(op, OUTPUTS_OF_EXPERTS[op.kind]))
        for graph in model.blocks.values()
        for op in graph.ops
        if op.kind in OUTPUTS_OF_EXPERTS
    ]


def _size(op: Op, dim: int) -> int:
    return prod(bind(op.sizes[factor], {}) for factor in op.rule.operands[1][dim])
