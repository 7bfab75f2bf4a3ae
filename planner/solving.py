"""A candidate solved: its stages cut, its step estimated, its schedule simulated where it lies."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import pairwise

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.memory import BUFFERED_BLOCKS, StageBytes
from ..costmodel.overlap import overlap_cost_fraction
from ..costmodel.steptime import accumulation_seconds
from ..ir import InvalidInput
from ..ir.mesh import Mesh
from ..ir.plan import NodeMapping, Recompute
from .alike import Alike
from .bounds import Shares, afterwards_seconds, distinct_of, floor_of
from .candidates import Candidate, placement_of
from .every_cut import MOST_SEGMENTS, best_cut
from .footprint import gathered_bytes, held_state, host_room, in_flight
from .inner import Inner
from .insides import Insides
from .linear_program import Solver
from .request import Request, bounds_of, pinned_stages, repeated
from .sites import Sites
from .stages import Cut, Rank, SegmentTable, Shortfall, cut_stages, pipeline_floor_seconds
from .step import StepPrice, price_step, stages_of, sync_seconds, traffic_of, transfer_seconds
from .traffic import in_order, mapped
from .virtual_stages import cut_virtual

ESTIMATE_ERROR = 0.02
"""Of the estimate of schedules with virtual stages, at most (`benchmarks/schedules.py`)."""
_TRIES = 8
"""Times that stages are cut for a memory limit, each time for what the last ones exceeded less."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved candidate: stages, step time with its parts in seconds, memory per pipeline rank.
    `floor_seconds` is what no other cut or recomputation of the same candidate can beat,
    `busy_seconds` what a rank computes, on average; `inners` are the insides of blocks as each rank
    has them."""

    candidate: Candidate
    inners: tuple[Inner, ...]
    cut: Cut
    seconds: float
    time: dict[str, float]
    memory: tuple[StageBytes, ...]
    floor_seconds: float
    busy_seconds: float
    mapping: NodeMapping | None = None

    @property
    def inner(self) -> Inner:
        """The types and prices on the first rank; types are the same on all."""
        return self.inners[0]


@dataclass(slots=True)
class Solving:
    """What it takes to solve the candidates of one request; keeps what they share.

    `like` is an earlier one for the same model and work on other numbers of the same nodes: what
    it solved inside nodes is not solved again. `anything`: also with what no backend emits yet.
    """

    request: Request
    solver: Solver = "highs"
    like: InitVar[Solving | None] = None
    anything: bool = False
    insides: Insides = field(init=False)
    sites: Sites = field(init=False)
    alike: Alike = field(init=False)
    stage_of: list[int | None] = field(init=False)
    layer: list[bool] = field(init=False)
    uses: dict[str, list[int]] = field(init=False)

    def __post_init__(self, like: Solving | None) -> None:
        model = self.request.model
        self.request.check()
        self.insides = Insides(self.request, self.solver, self.anything)
        hardware = self.request.hardware or self.request.cluster
        self.sites = Sites.of(hardware, self.request.cluster)
        if like is not None and _inside(like.request.cluster) == _inside(self.request.cluster):
            self.insides.shared_with(like.insides)
        self.alike = like.alike if like is not None else Alike.of(_kinds(self.request))
        self.stage_of = pinned_stages(model)
        layers = repeated(model)
        self.layer = [i in layers for i in range(len(model.segments))]
        every = model.uses() if model.tied else {}
        self.uses = {name: uses for name, uses in every.items() if name in model.tied}

    def mesh(self, candidate: Candidate) -> Mesh:
        """pp, dp and tp with its sub-axes, outermost first."""
        return self.insides.mesh(candidate)

    def inners(self, candidate: Candidate) -> tuple[Inner, ...] | None:
        """The insides of blocks on every pipeline rank; None where tp splits nothing."""
        views = self.sites.views(candidate)
        known = {id(view): self.insides.of(candidate, view) for view in _distinct(views)}
        found = [inner for view in views if (inner := known[id(view)]) is not None]
        return tuple(found) if len(found) == len(views) else None

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
            # where layers are large, what little is taken off may change no cut
            return (
                self._solved(candidate, floor_s, workspace=False, faster=2)
                if isinstance(found, Shortfall)
                else found
            )
        return other if isinstance(found, Shortfall) else min(found, other, key=_seconds)

    def with_cut(self, candidate: Candidate, cut: Cut) -> Outcome:
        """A candidate whose stages are given, whether they fit the memory or not."""
        inners = self.inners(candidate)
        if inners is None:
            raise InvalidInput(f"tp={candidate.tp} splits no operation of the model")
        return self._outcome(candidate, inners, cut, 0.0)

    def _outcome(
        self, candidate: Candidate, inners: tuple[Inner, ...], cut: Cut, floor_s: float
    ) -> Outcome:
        price = price_step(self.request, candidate, inners, cut.bounds, cut.modes, exact=False)
        floor = max(floor_s, self._floor(candidate, inners, price))
        return Outcome(
            candidate, inners, cut, price.seconds, dict(price.time), price.memory,
            min(floor, price.seconds), price.busy_seconds,
        )  # fmt: skip

    def _solved(
        self, candidate: Candidate, floor_s: float, workspace: bool, faster: int = 1
    ) -> Outcome | Shortfall:
        """`faster`: how many times more is taken off the limit from one try to the next."""
        inners = self.inners(candidate)
        assert inners is not None
        limits = [float(inner.cluster.device.memory_limit_bytes) for inner in inners]
        rooms = list(limits)
        for tried in range(_TRIES):
            cut = self.cut(candidate, rooms, workspace)
            if isinstance(cut, Shortfall):
                lost = max(limit - room for limit, room in zip(limits, rooms, strict=True))
                return Shortfall(cut.needed_bytes + lost, tried == 0 and not workspace)
            outcome = self._outcome(candidate, inners, cut, floor_s)
            excess = [
                stage.total - limit for stage, limit in zip(outcome.memory, limits, strict=True)
            ]
            if max(excess) <= 0:
                return outcome
            rooms = [
                room - faster**tried * max(0.0, over)
                for room, over in zip(rooms, excess, strict=True)
            ]
        return Shortfall(max(limits) + max(excess), proved=False)

    def cut(
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
        shares = Shares.of(self.request, inners)
        floor = pipeline_floor_seconds(
            self._ranks(candidate, share=shares.forward), self.alike,
            floor_of(candidate, shares, transfer), worth_s,
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
        share: float | None = None,
    ) -> list[Rank]:
        """Pipeline ranks as stages are cut for; with a `share` of a layer that its forward pass
        takes at most, for a bound."""
        inners = self.inners(candidate)
        assert inners is not None
        tables = {
            id(inner): self._table(candidate, inner, workspace, share)
            for inner in distinct_of(inners)
        }
        room = limits or [float(inner.cluster.device.memory_limit_bytes) for inner in inners]
        return [
            Rank(tables[id(inner)], in_flight(candidate, rank), limit, host_room(inner))
            for rank, (inner, limit) in enumerate(zip(inners, room, strict=True))
        ]

    def _table(
        self, candidate: Candidate, inner: Inner, workspace: bool, share: float | None = None
    ) -> SegmentTable:
        """The segments as `cut_stages` wants them: compute slowed by the communication that it
        hides, and by adding up gradients."""
        request, model = self.request, self.request.model
        modes = tuple(mode for mode in self.insides.modes if mode in inner.modes)
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
        plain = [inner.costs[b, "none"] for b in blocks]
        seconds = slowed + np.array([
            [cost.seconds if share is None else cost.least_seconds(none, share)
             for cost, none in zip(row, plain, strict=True)]
            for row in costs
        ])  # fmt: skip
        kept = np.array([[float(cost.memory.kept) for cost in row] for row in costs])
        peaks = np.array([[float(cost.memory.workspace) for cost in row] for row in costs])
        away = np.array([[cost.memory.offloaded for cost in row] for row in costs])
        buffers = np.array(gathers, np.float64) + BUFFERED_BLOCKS * away
        shared = []
        for name, uses in self.uses.items():
            for first, last in pairwise(uses):
                segment = model.segments[first]
                elements = inner.local_parameters[segment.block][segment.parameters.index(name)]
                size = held_state(request, candidate, elements, 0).total
                shared.append((first, last, float(size)))
        return SegmentTable(
            modes, seconds[:, at], kept[:, at],
            (workspace * peaks + buffers)[:, at], np.array(state, np.float64)[at], tuple(shared),
            np.array(waits)[at], away[:, at].astype(np.float64) if away.any() else None,
        )  # fmt: skip

    def placed(
        self, outcome: Outcome, search: bool, node_of: Sequence[int] | None = None
    ) -> Outcome:
        """A finalist, its schedule simulated on the links it uses: with `search` on the nodes that
        suit it best, otherwise on nodes in order, or in that of `node_of`."""
        request, candidate, cut = self.request, outcome.candidate, outcome.cut
        views = [inner.cluster for inner in outcome.inners]
        mapping, slowdown = None, in_order(request.cluster, candidate, views, node_of)
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


def _distinct(views: Sequence[Cluster]) -> list[Cluster]:
    return list({id(view): view for view in views}.values())


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
