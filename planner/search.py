"""The search over configurations: best first, with admissible bounds.

One queue, in which what is looked at next is what could be fastest. A set of degrees enters with
its FLOPs at the device's peak; once its blocks are typed, with their time and the bubble; then each
of its variants (schedule, ZeRO) with a bound that knows memory (`bounds`); a variant whose turn it
is, is solved: its stages are cut and the step estimated; and when no estimate or bound is lower,
its schedule is simulated on the links it uses. So most variants are never solved, and the best
simulated one is known to be so when its turn comes again.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import count, pairwise

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.memory import StageBytes, state_bytes
from ..costmodel.overlap import overlap_cost_fraction
from ..costmodel.steptime import accumulation_seconds
from ..ir import Infeasible, InvalidInput
from ..ir.mesh import Mesh
from ..ir.plan import NodeMapping, Recompute
from .alike import Alike
from .bounds import (
    Shares,
    afterwards_seconds,
    distinct_of,
    floor_of,
    step_floor_seconds,
    variant_floors,
)
from .candidates import (
    Candidate,
    heads,
    most_devices,
    placement_of,
    schedules,
    unemittable,
    variants,
)
from .every_cut import MOST_SEGMENTS, best_cut
from .fix import Fix
from .footprint import gathered_bytes, held_state, in_flight
from .inner import Inner
from .insides import Insides
from .linear_program import Solver
from .request import Request, bounds_of, pinned_stages, repeated
from .sites import Sites
from .stages import Cut, Rank, SegmentTable, Shortfall, cut_stages, pipeline_floor_seconds
from .step import StepPrice, price_step, stages_of, sync_seconds, traffic_of, transfer_seconds
from .traffic import has_choice, in_order, mapped
from .virtual_stages import cut_virtual

GIB = 2**30
TIE = 1e-3
"""Plans this close are equally fast. Of these the lowest ZeRO stage is taken that leaves a tenth of
the memory free: communication that is hidden on paper is not always hidden."""
MOST_MAPPED_NODES = 16
"""Nodes up to which every finalist is mapped; on more only the best one, the others in order."""
_MOST_NODES = 4096
"""Nodes of the largest cluster that an error looks at for one that fits."""
ESTIMATE_ERROR = 0.02
"""Of the estimate of schedules with virtual stages, at most (`benchmarks/schedules.py`)."""
_TRIES = 8
"""Times that stages are cut for a memory limit, each time for what the last ones exceeded less."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved candidate: stages, step time with its parts in seconds, memory per pipeline rank.
    `floor_seconds` is what no other cut or recomputation of the same candidate can beat; `inners`
    are the insides of blocks as each rank has them."""

    candidate: Candidate
    inners: tuple[Inner, ...]
    cut: Cut
    seconds: float
    time: dict[str, float]
    memory: tuple[StageBytes, ...]
    floor_seconds: float
    mapping: NodeMapping | None = None

    @property
    def inner(self) -> Inner:
        """The types and prices on the first rank; types are the same on all."""
        return self.inners[0]


@dataclass(frozen=True, slots=True)
class Found:
    """What a search returns: outcomes from the best on, and what was done to get there.

    `bound_seconds` is below every configuration of the space, whether solved or not.
    """

    outcomes: tuple[Outcome, ...]
    bound_seconds: float
    solved: int
    pruned: int
    infeasible: int
    seconds: float
    methods: dict[str, int]
    interrupted: bool = False


@dataclass(slots=True)
class _Counts:
    """What became of the variants that there are."""

    total: int = 0
    solved: int = 0
    infeasible: int = 0


@dataclass(slots=True)
class Search:
    """One run of the search; keeps what candidates share.

    `like` is an earlier search for the same model and work on other numbers of the same nodes: what
    it solved inside nodes is not solved again. `anything`: configurations that no backend emits yet
    count as well.
    """

    request: Request
    solver: Solver = "highs"
    anything: bool = False
    like: InitVar[Search | None] = None
    insides: Insides = field(init=False)
    sites: Sites = field(init=False)
    alike: Alike = field(init=False)
    stage_of: list[int | None] = field(init=False)
    layer: list[bool] = field(init=False)
    least_flops: float = field(init=False)
    uses: dict[str, list[int]] = field(init=False)
    _heads: int = 0

    def __post_init__(self, like: Search | None) -> None:
        model = self.request.model
        self.request.check()
        self.insides = Insides(self.request, self.solver)
        hardware = self.request.hardware or self.request.cluster
        self.sites = Sites.of(hardware, self.request.cluster)
        if like is not None and _inside(like.request.cluster) == _inside(self.request.cluster):
            self.insides.shared_with(like.insides)
        self.alike = like.alike if like is not None else Alike.of(_kinds(self.request))
        self.stage_of = pinned_stages(model)
        layers = repeated(model)
        self.layer = [i in layers for i in range(len(model.segments))]
        self.least_flops = self.request.least_flops_per_step()
        every = model.uses() if model.tied else {}
        self.uses = {name: uses for name, uses in every.items() if name in model.tied}

    def run(self, top: int = 5, progress: Callable[[str], None] | None = None) -> Found:
        """The `top` best configurations.

        Raises Infeasible, saying what is short and what would fit, where no configuration fits
        the memory. Interrupted (KeyboardInterrupt), it returns the best so far.
        """
        began = time.process_time()
        every = heads(self.request)
        every = [head for head in every if self._counts(head)]
        self._heads = len(every)
        order = count()
        queue: list[tuple[float, int, int, Candidate, Outcome | None]] = [
            (self._flops_floor(head), next(order), 0, head, None) for head in every
        ]
        heapq.heapify(queue)
        counts, finals = _Counts(), list[Outcome]()
        solved: list[Outcome] = []
        short: list[tuple[float, Candidate]] = []
        interrupted, unproved = False, list[float]()
        few = self.request.cluster.nodes <= MOST_MAPPED_NODES
        try:
            while queue and len(finals) < top:
                bound, _, level, candidate, outcome = heapq.heappop(queue)
                found: list[tuple[float, int, Candidate, Outcome | None]] = []
                if level == 0:
                    found = self._typed(candidate, bound)
                elif level == 1:
                    found = self._varied(candidate, bound, counts, short)
                elif level == 2:
                    if progress is not None:
                        progress(f"{candidate.key}: {counts.solved} solved, {len(queue)} to go")
                    result = self.solve(candidate, bound)
                    if isinstance(result, Outcome):
                        counts.solved += 1
                        solved.append(result)
                        found = [(max(bound, result.seconds), 3, candidate, result)]
                    else:
                        counts.infeasible += 1
                        short.append((result.needed_bytes, candidate))
                        unproved += [] if result.proved else [bound]
                elif level == 3:
                    assert outcome is not None
                    placed = self._placed(outcome, search=few)
                    found = [(placed.seconds, 4, candidate, placed)]
                else:
                    assert outcome is not None
                    finals.append(outcome)
                for key, at, each, what in found:
                    heapq.heappush(queue, (key, next(order), at, each, what))
        except KeyboardInterrupt:
            interrupted = True
            simulated = [o for *_, level, _, o in queue if level == 4 and o is not None]
            finals += sorted(simulated, key=lambda o: o.seconds)
            if not finals and solved:
                finals.append(self._placed(min(solved, key=lambda o: o.seconds), search=False))
            if not finals:
                raise
        self._check_refused(every)
        if not finals:
            self._raise_infeasible(short)
        best = min(o.seconds for o in finals)
        open_floors = [
            key if outcome is None else self._settled(outcome, best).floor_seconds
            for key, _, _, _, outcome in queue
        ]
        return self._found(finals[:top], [*open_floors, *unproved], counts, interrupted, began)

    def _found(
        self,
        finals: list[Outcome],
        open_floors: Sequence[float],
        counts: _Counts,
        interrupted: bool,
        began: float,
    ) -> Found:
        tied = [o for o in finals if o.seconds <= finals[0].seconds * (1 + TIE)]
        chosen = min(tied, key=self._preference)
        others = [o for o in finals if o is not chosen]
        if chosen.mapping is None and has_choice(self.request.cluster) and self.sites.alike:
            chosen = self._placed(chosen, search=True)
        floors = [*open_floors, *(o.floor_seconds for o in finals), chosen.seconds]
        return Found(
            (chosen, *others),
            min(floors),
            counts.solved,
            counts.total - counts.solved - counts.infeasible,
            counts.infeasible,
            time.process_time() - began,
            dict(Counter(self.insides.methods())),
            interrupted,
        )

    def _settled(self, outcome: Outcome, best_s: float) -> Outcome:
        """A solved candidate whose floor says as much as it can: where only the estimate is between
        it and the best, it is simulated."""
        near = outcome.candidate.vpp > 1 and outcome.floor_seconds < min(best_s, outcome.seconds)
        return self._placed(outcome, search=False) if near else outcome

    # --- one step of the search ------------------------------------------------------------------

    def _typed(
        self, head: Candidate, bound: float
    ) -> list[tuple[float, int, Candidate, Outcome | None]]:
        """A set of degrees whose blocks are typed now."""
        inners = self.inners(head)
        if inners is None:
            return []
        through = min(self._through(inner) for inner in distinct_of(inners))
        shares = Shares.of(self.request, inners)
        each = [
            replace(head, schedule=name, vpp=vpp) for name, vpp in schedules(self.request, head)
        ]
        floors = [step_floor_seconds(through, one, shares) for one in each if self._counts(one)]
        return [(max(bound, min(floors)), 1, head, None)] if floors else []

    def _varied(
        self,
        head: Candidate,
        bound: float,
        counts: _Counts,
        short: list[tuple[float, Candidate]],
    ) -> list[tuple[float, int, Candidate, Outcome | None]]:
        """Its variants, each with its bound."""
        inners, options = self.inners(head), self._allowed(head)
        assert inners is not None
        counts.total += len(options)
        floors = variant_floors(self.request, options, inners)
        never = ~np.isfinite(floors)
        counts.infeasible += int(never.sum())
        if never.any():  # remembered in case nothing fits anywhere
            thriftiest = options[max(i for i in np.flatnonzero(never))]
            short.append((float("nan"), thriftiest))
        return [
            (max(bound, float(floor)), 2, each, None)
            for floor, each in zip(floors, options, strict=True)
            if np.isfinite(floor)
        ]

    def _allowed(self, head: Candidate) -> list[Candidate]:
        every = variants(self.request, head)
        return [each for each in every if self._counts(each)]

    def _counts(self, candidate: Candidate) -> bool:
        """Whether a candidate is one of those that the search is for."""
        return self.anything or unemittable(candidate) is None

    def _check_refused(self, every: Sequence[Candidate]) -> None:
        """Raises Infeasible, naming the pin, where pins on types hold at no tp that splits: with
        tp=1 they would be kept in name only."""
        refused = self.insides.refused
        wide = [head for head in every if head.tp > 1]
        if refused and not any(self.inners(head) is not None for head in wide):
            raise refused[max(refused)]

    def _raise_infeasible(self, short: Sequence[tuple[float, Candidate]]) -> None:
        known = []
        for needed, candidate in short:
            if not np.isfinite(needed):
                cut = self._cut(candidate)
                needed = cut.needed_bytes if isinstance(cut, Shortfall) else float("inf")
            known.append((needed, candidate))
        if not known:
            raise InvalidInput(self._useless())
        needed, candidate = min(known)
        if needed == float("inf"):
            raise Infeasible(self._contradiction(candidate))
        raise Infeasible(self._shortage(needed, candidate))

    def _preference(self, outcome: Outcome) -> tuple[bool, int, int]:
        fullest = max(stage.total for stage in outcome.memory)
        return fullest > 0.9 * self.request.limit_bytes, outcome.candidate.zero, fullest

    # --- bounds ----------------------------------------------------------------------------------

    def _flops_floor(self, candidate: Candidate) -> float:
        """Before anything is solved: all FLOPs at the device's peak."""
        peak = self.request.peak_flops_per_s
        step = self.least_flops / peak
        if self.anything or candidate.pp == 1:
            return step
        through = step * candidate.pp / candidate.microbatches
        return step_floor_seconds(through, candidate, Shares(1.0, 0.0))

    def _through(self, inner: Inner) -> float:
        """The least seconds of a microbatch through the whole model."""
        least: dict[str, float] = {}
        for (block, _), cost in inner.costs.items():
            least[block] = min(least.get(block, float("inf")), cost.seconds)
        return sum(count * least[block] for block, count in self.request.model.counts.items())

    # --- one candidate ---------------------------------------------------------------------------

    def mesh(self, candidate: Candidate) -> Mesh:
        """pp, dp and tp with its sub-axes, outermost first."""
        return self.insides.mesh(candidate)

    def inners(self, candidate: Candidate) -> tuple[Inner, ...] | None:
        """The insides of blocks on every pipeline rank; None where tp splits nothing."""
        found = []
        for view in self.sites.views(candidate):
            inner = self.insides.of(candidate, view)
            if inner is None:
                return None
            found.append(inner)
        return tuple(found)

    def solve(self, candidate: Candidate, floor_s: float = 0.0) -> Outcome | Shortfall:
        """Cuts the stages of a candidate and estimates the step. `floor_s` is a bound that is
        already known.

        Stages are cut without their workspace, which depends on how they are cut, and again with
        what did not fit taken off; where that is not the end of it, also with all the workspace
        that there could be, and the better is taken.
        """
        found = self._solved(candidate, floor_s, workspace=False)
        if isinstance(found, Shortfall) and found.proved:
            return found
        small, inners = len(self.layer) <= MOST_SEGMENTS, self.inners(candidate)
        roomy = isinstance(found, Outcome) and not any(map(_recomputes, found.cut.modes))
        if roomy and not (small and candidate.vpp > 1):
            return found
        if small and inners is not None:
            modes = self.insides.modes
            cut = best_cut(self.request, candidate, inners, modes, self.stage_of)
            return found if cut is None else self._outcome(candidate, inners, cut, floor_s)
        other = self._solved(candidate, floor_s, workspace=True)
        if isinstance(other, Shortfall):
            return found
        return other if isinstance(found, Shortfall) else min(found, other, key=_seconds)

    def _outcome(
        self, candidate: Candidate, inners: tuple[Inner, ...], cut: Cut, floor_s: float
    ) -> Outcome:
        price = price_step(self.request, candidate, inners, cut.bounds, cut.modes, exact=False)
        floor = max(floor_s, self._floor(candidate, inners, price))
        return Outcome(
            candidate, inners, cut, price.seconds, dict(price.time), price.memory,
            min(floor, price.seconds),
        )  # fmt: skip

    def _solved(self, candidate: Candidate, floor_s: float, workspace: bool) -> Outcome | Shortfall:
        inners = self.inners(candidate)
        assert inners is not None
        limits = [float(inner.cluster.device.memory_limit_bytes) for inner in inners]
        rooms = list(limits)
        for tried in range(_TRIES):
            cut = self._cut(candidate, rooms, workspace)
            if isinstance(cut, Shortfall):
                lost = max(limit - room for limit, room in zip(limits, rooms, strict=True))
                return Shortfall(cut.needed_bytes + lost, tried == 0 and not workspace)
            outcome = self._outcome(candidate, inners, cut, floor_s)
            excess = [
                stage.total - limit for stage, limit in zip(outcome.memory, limits, strict=True)
            ]
            if max(excess) <= 0:
                return outcome
            rooms = [room - max(0.0, over) for room, over in zip(rooms, excess, strict=True)]
        return Shortfall(max(limits) + max(excess), proved=False)

    def _cut(
        self,
        candidate: Candidate,
        limits: Sequence[float] | None = None,
        workspace: bool = False,
    ) -> Cut | Shortfall:
        request, model = self.request, self.request.model
        ranks = self._ranks(candidate, limits, workspace)
        stages = request.fix.stages
        if candidate.vpp > 1:
            cut = cut_virtual(
                ranks, placement_of(candidate), repeated(model), len(model.segments),
                candidate.microbatches, stages,
            )  # fmt: skip
        else:
            cut = cut_stages(
                ranks, self.alike, candidate.microbatches, self.stage_of,
                bounds_of(model, stages) if stages else None,
            )  # fmt: skip
        return cut if isinstance(cut, Shortfall) else self._layers_only(cut)

    def _floor(self, candidate: Candidate, inners: Sequence[Inner], price: StepPrice) -> float:
        """What no cut of a candidate can beat, whatever it recomputes. With virtual stages the
        balanced cut is part of the candidate, and what the estimate may be off is all that is
        between."""
        if candidate.vpp > 1:
            return (1 - ESTIMATE_ERROR) * (price.seconds - price.time["data_parallel"])
        worth_s = price.seconds
        after = min(
            afterwards_seconds(self.request, candidate, inner) for inner in distinct_of(inners)
        )
        carried = min(min(inner.carried_bytes.values()) for inner in inners)
        transfer = transfer_seconds(self.request, candidate, carried) if candidate.pp > 1 else 0.0
        floor = pipeline_floor_seconds(
            self._ranks(candidate), self.alike,
            floor_of(candidate, Shares.of(self.request, inners), transfer), worth_s,
        )  # fmt: skip
        return min(floor + after, worth_s)

    def _layers_only(self, cut: Cut) -> Cut:
        """A cut whose modes are those of layers; what is no layer is not recomputed."""
        modes = tuple(
            tuple(mode if self.layer[first + i] else "none" for i, mode in enumerate(stage))
            for first, stage in zip(cut.bounds, cut.modes, strict=False)
        )
        return replace(cut, modes=modes)

    def _ranks(
        self,
        candidate: Candidate,
        limits: Sequence[float] | None = None,
        workspace: bool = False,
    ) -> list[Rank]:
        """Pipeline ranks as stages are cut for."""
        inners = self.inners(candidate)
        assert inners is not None
        tables = {
            id(inner): self._table(candidate, inner, workspace) for inner in distinct_of(inners)
        }
        room = limits or [float(inner.cluster.device.memory_limit_bytes) for inner in inners]
        return [
            Rank(tables[id(inner)], in_flight(candidate, rank), limit)
            for rank, (inner, limit) in enumerate(zip(inners, room, strict=True))
        ]

    def _table(self, candidate: Candidate, inner: Inner, workspace: bool) -> SegmentTable:
        """The segments as `cut_stages` wants them: compute slowed by the communication that it
        hides, and by adding up gradients."""
        request, model, modes = self.request, self.request.model, self.insides.modes
        blocks = list(dict.fromkeys(segment.block for segment in model.segments))
        layer = {s.block: self.layer[i] for i, s in enumerate(model.segments)}
        at = np.array([blocks.index(segment.block) for segment in model.segments])
        waits, added, state, gathers = [], [], [], []
        for block in blocks:
            dense, experts = inner.parameters_of(model.blocks[block], block)
            sync = sync_seconds(request, candidate, inner.cluster, dense, experts)
            waits.append(sync.per_microbatch_s)
            accumulates = candidate.microbatches > 1 and not request.runtime.fused_accumulation
            added.append(
                accumulation_seconds(
                    inner.cluster.device, dense + experts, request.precision,
                    request.runtime.gradient_bytes,
                ) if accumulates else 0.0
            )  # fmt: skip
            state.append(held_state(request, candidate, dense, experts).total)
            gathers.append(gathered_bytes(request, candidate, inner, [block]))
        slowed = overlap_cost_fraction() * np.array(waits) + np.array(added)
        costs = [[inner.costs[b, mode if layer[b] else "none"] for b in blocks] for mode in modes]
        seconds = np.array([[cost.seconds for cost in row] for row in costs]) + slowed
        kept = np.array([[float(cost.memory.kept) for cost in row] for row in costs])
        peaks = np.array([[float(cost.memory.workspace) for cost in row] for row in costs])
        shared = []
        for name, uses in self.uses.items():
            for first, last in pairwise(uses):
                segment = model.segments[first]
                elements = inner.local_parameters[segment.block][segment.parameters.index(name)]
                size = held_state(request, candidate, elements, 0).total
                shared.append((first, last, float(size)))
        return SegmentTable(
            modes, seconds[:, at], kept[:, at],
            (workspace * peaks + np.array(gathers, np.float64))[:, at],
            np.array(state, np.float64)[at], tuple(shared), np.array(waits)[at],
        )  # fmt: skip

    def _placed(self, outcome: Outcome, search: bool) -> Outcome:
        """A finalist, its schedule simulated on the links it uses: with `search` on the nodes that
        suit it best, otherwise on nodes in order."""
        request, candidate, cut = self.request, outcome.candidate, outcome.cut
        views = [inner.cluster for inner in outcome.inners]
        mapping, slowdown = None, in_order(request.cluster, candidate, views)
        if search and slowdown is not None and self.sites.alike:
            stages = stages_of(request, candidate, outcome.inners, cut.bounds, cut.modes)
            traffic = traffic_of(request, candidate, stages)
            mapping, slowdown = mapped(request.cluster, candidate, traffic)
        price = price_step(
            request, candidate, outcome.inners, cut.bounds, cut.modes, slowdown=slowdown
        )
        return replace(
            outcome,
            seconds=price.seconds,
            time=dict(price.time),
            memory=price.memory,
            mapping=mapping,
            floor_seconds=price.seconds if candidate.vpp > 1 else outcome.floor_seconds,
        )

    # --- messages --------------------------------------------------------------------------------

    def _contradiction(self, candidate: Candidate) -> str:
        pins = ", ".join(
            f"{p.name or 'the model'}={p.stage}" for p in self.request.model.pins if p.stage >= 0
        )
        stages = self.request.fix.stages
        layers = f" and stages={'-'.join(map(str, stages))}" if stages else ""
        return (
            f"no cut into pp={candidate.pp} stages keeps the stage pins ({pins}){layers}: stages "
            "are contiguous, in order, and hold at least one layer or end of the model each"
        )

    def _useless(self) -> str:
        return (
            f"--fix: tp={self.request.fix.tp}: no operation of the model can be split over "
            f"{self.request.fix.tp} devices (heads, hidden sizes and sequence length "
            f"{self.request.workload.seq_len} do not divide by it)"
        )

    def _shortage(self, needed: float, candidate: Candidate) -> str:
        request, cluster = self.request, self.request.cluster
        limit = request.limit_bytes
        text = (
            f"no plan fits: the thriftiest configuration ({candidate.key}) needs "
            f"{needed / GIB:.1f} GiB per device, {cluster.device.name} has {limit / GIB:.1f} GiB "
            f"usable: {(needed - limit) / GIB:.1f} GiB short"
        )
        devices = cluster.devices_per_node
        smallest = self._smallest_cluster(request.fix, cluster.nodes + 1)
        if smallest is not None:
            return f"{text}; the smallest cluster that fits is {_nodes(smallest, devices)}"
        free = replace(request.fix, pp=None, dp=None, stages=None)
        smallest = self._smallest_cluster(free, cluster.nodes) if free != request.fix else None
        if smallest is not None:
            return (
                f"{text}; nor does it fit a larger cluster with {request.fix}; without pp, dp and "
                f"stages {_nodes(smallest, devices)} would do"
            )
        filled = f"that a batch of {request.workload.global_batch} sequences can fill"
        few = most_devices(request) < _MOST_NODES * devices
        return f"{text}; nor does it fit any larger cluster of this kind " + (
            filled if few else f"of up to {_nodes(_MOST_NODES, devices)}"
        )

    def _smallest_cluster(self, fix: Fix, start: int) -> int | None:
        """Nodes of the smallest cluster from `start` nodes on where some configuration fits.

        What fits is not monotone in the nodes (degrees must divide them and the batch), so every
        count is looked at, those aside whose memory all together is too little.
        """
        request, cluster = replace(self.request, fix=fix), self.request.cluster
        state = state_bytes(request.model.elements, request.precision, 3, shards=1).total
        start = max(start, -(-state // (request.limit_bytes * cluster.devices_per_node)))
        last = min(_MOST_NODES, most_devices(request) // cluster.devices_per_node)
        for nodes in range(start, last + 1):
            try:
                larger = replace(request, cluster=cluster.resized(nodes))
                other = Search(larger, self.solver, self.anything, like=self)
                options = [
                    head
                    for head in heads(larger)
                    if head.ep * head.etp * head.cp == 1
                    or larger.fix.ep
                    or larger.fix.etp
                    or larger.fix.cp
                    or self.anything
                ]
            except InvalidInput:
                continue
            smallest = min(head.micro_batch for head in options)
            thrifty = [head for head in options if head.micro_batch == smallest]
            if any(other._fits(head) for head in thrifty):
                return nodes
        return None

    def _fits(self, head: Candidate) -> bool:
        """Whether some variant of a set of degrees fits the memory."""
        inners, options = self.inners(head), self._allowed(head)
        if inners is None or not options:
            return False
        floors = variant_floors(self.request, options, inners)
        possible = [each for floor, each in zip(floors, options, strict=True) if np.isfinite(floor)]
        return any(isinstance(self.solve(each), Outcome) for each in possible)


def _recomputes(modes: Sequence[Recompute]) -> bool:
    return any(mode != "none" for mode in modes)


def _seconds(outcome: Outcome) -> float:
    return outcome.seconds


def _kinds(request: Request) -> list[Hashable]:
    """What makes segments alike: their block, and the parameters that others use as well."""
    model = request.model
    return [
        (segment.block, *(name for name in segment.parameters if name in model.tied))
        for segment in model.segments
    ]


def _inside(cluster: Cluster) -> Hashable:
    """All that what happens inside a node depends on."""
    levels = [at for at in cluster.worst_levels if at.span_devices <= cluster.devices_per_node]
    return cluster.device, cluster.devices_per_node, tuple(levels), cluster.curves


def _nodes(count: int, devices: int) -> str:
    return f"{count} node{'s' * (count > 1)} of {devices} device{'s' * (devices > 1)}"
