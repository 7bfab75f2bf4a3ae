"""What a step of a plan would take if one thing were different: links, devices, memory, batch.

The strategy stays, and so do the types inside blocks. Where links or devices get faster the stages
stay as well; with another memory or batch they are cut anew, as memory decides what is recomputed
and a batch what the bubble costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..costmodel import what_if
from ..costmodel.cluster import Cluster
from ..costmodel.yaml_files import validated
from ..ir import InvalidInput
from ..ir.plan import Annotation, Plan
from ..ir.workload import Workload
from .candidates import Candidate, unemittable
from .fix import Fix
from .request import Request
from .solving import Outcome, Solving
from .stages import Cut, Shortfall

MORE, LESS = 1.1, 0.9
"""How much more of everything: the answer is a slope, and 10 % shows above what rounding does. Of
memory also how much less."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing changed by a factor, and what a step takes then for each sequence of the batch:
    `step_fraction` of what it takes now. None where the strategy does not fit any more."""

    what: str
    factor: float
    step_fraction: float | None

    @property
    def saves(self) -> float:
        """The part of a step that it saves, below 0 where it costs."""
        return 0.0 if self.step_fraction is None else 1 - self.step_fraction


def sensitivity(plan: Plan) -> tuple[Change, ...]:
    """What changes of links, devices, memory and batch do to the time of a step."""
    return tuple(_Variations(plan).all())


def candidate_of(plan: Plan) -> Candidate:
    """The configuration that a plan's strategy is."""
    s = plan.strategy
    return Candidate(
        s.pp, s.dp, s.tp, s.zero, s.micro_batch, plan.microbatches, s.schedule, s.vpp, s.cp, s.ep,
        s.etp, s.zero_group, s.ulysses, s.gradient_group, s.parameter_group, s.parallel_block,
        s.ladder_residual, s.local_update,
    )  # fmt: skip


class _Variations:
    """A plan priced again, on other clusters and for other batches."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.candidate = plan, candidate_of(plan)
        self.cluster = validated(Cluster, plan.cluster, "the plan's cluster")
        self.work = Workload(**plan.workload)
        self.types: Mapping[str, Annotation] = {
            block: types.on(plan.tensor_axes) for block, types in plan.annotations.items()
        }
        bounds = (*(stage.first for stage in plan.stages), plan.stages[-1].last)
        modes = tuple(stage.recompute for stage in plan.stages)
        self.cut = Cut(bounds, modes, (0.0,) * len(modes))

    def all(self) -> Iterator[Change]:
        now = self._as_it_is(self.cluster)
        if self.cluster.world_size > 1:
            for index, level in enumerate(self.cluster.levels):
                faster = what_if.with_level(self.cluster, index, MORE)
                yield Change(f"links of level {level.name}", MORE, self._as_it_is(faster) / now)
            for index, pair in enumerate(self.cluster.pairs):
                faster = what_if.with_pair(self.cluster, index, MORE)
                ends = " and ".join(map(str, pair.ends))
                yield Change(f"links between {ends}", MORE, self._as_it_is(faster) / now)
        faster = what_if.with_arithmetic(self.cluster, MORE)
        yield Change("arithmetic of the devices", MORE, self._as_it_is(faster) / now)
        faster = what_if.with_memory_bandwidth(self.cluster, MORE)
        yield Change("memory bandwidth", MORE, self._as_it_is(faster) / now)
        again = self._cut_anew(self.cluster, self.candidate) or now
        for factor in (MORE, LESS):
            other = self._cut_anew(what_if.with_memory(self.cluster, factor), self.candidate)
            yield Change("memory", factor, None if other is None else other / again)
        for factor in (2.0, 0.5):
            count = self.candidate.microbatches * factor
            if count == int(count) and count >= self.candidate.pp:
                other = self._cut_anew(
                    self.cluster, replace(self.candidate, microbatches=int(count))
                )
                fraction = None if other is None else other / (factor * again)
                yield Change("global batch", factor, fraction)

    def _solving(self, cluster: Cluster, candidate: Candidate) -> Solving:
        work = self.work.model_copy(
            update={"global_batch": candidate.microbatches * candidate.micro_batch * candidate.dp}
        )
        anything = unemittable(self.plan.strategy) is not None
        solving = Solving(Request.on(self.plan.model, cluster, work, Fix()), anything=anything)
        solving.insides.given(candidate, self.types)
        return solving

    def _placed(self, solving: Solving, outcome: Outcome) -> float:
        """Seconds of a step on the plan's own nodes in their order: another order, found for other
        links, would be another change."""
        mapping = self.plan.mapping
        node_of = None if mapping is None else mapping.node_of
        return solving.placed(outcome, search=False, node_of=node_of).seconds

    def _as_it_is(self, cluster: Cluster) -> float:
        """Seconds of a step with the plan's stages."""
        solving = self._solving(cluster, self.candidate)
        return self._placed(solving, solving.with_cut(self.candidate, self.cut))

    def _cut_anew(self, cluster: Cluster, candidate: Candidate) -> float | None:
        """Seconds of a step with the stages that suit it best, None where none fit."""
        try:
            solving = self._solving(cluster, candidate)
        except InvalidInput:
            return None
        found = solving.solve(candidate)
        return None if isinstance(found, Shortfall) else self._placed(solving, found)
