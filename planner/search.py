"""The search over configurations: best first, with an admissible bound per candidate.

For a microbatch that takes `T` in all on its way through the model and `m` microbatches, no cut
into `p` stages runs a step in less than `T / (1 - (1 - 1/m)^p)`: the design's bound
`max_s [m·T_s + Σ_{i<s} T_i]` is least where all its terms are equal, and that is their value. `T`
is the optimum of the SBP program for time alone, so a candidate whose bound is above the best plan
found is never solved.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import pairwise

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.memory import StageBytes, StateBytes, gather_bytes, state_bytes
from ..costmodel.overlap import overlap_cost_fraction
from ..costmodel.steptime import data_parallel_sync
from ..ir import Infeasible, InvalidInput
from ..ir.from_dims import expert_binding
from ..ir.mesh import Mesh
from ..ir.plan import NodeMapping, Recompute
from .candidates import Candidate, candidates, most_devices
from .chain import Chain
from .fix import Fix
from .inner import MODES, Inner, solve_inner, splits_anything, sub_axes
from .linear_program import Solver
from .request import Request, bounds_of, pinned_stages, pinned_types, repeated
from .stages import Array, Cut, SegmentTable, Shortfall, cut_stages
from .step import in_flight, price_step, rank_state, stages_of, traffic_of
from .traffic import has_choice, in_order, mapped

GIB = 2**30
TIE = 1e-3
"""Plans this close are equally fast. Of these the lowest ZeRO stage is taken that leaves a tenth of
the memory free: communication that is hidden on paper is not always hidden."""
MOST_MAPPED_NODES = 16
"""Nodes up to which every finalist is mapped; on more only the best one, the others in order."""
_MOST_NODES = 4096
"""Nodes of the largest cluster that an error looks at for one that fits."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved candidate: stages, step time with its parts in seconds, memory per stage."""

    candidate: Candidate
    inner: Inner
    cut: Cut
    seconds: float
    time: dict[str, float]
    memory: tuple[StageBytes, ...]
    mapping: NodeMapping | None = None


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


@dataclass(slots=True)
class Search:
    """One run of the search; keeps what candidates share.

    `like` is an earlier search for the same model and work on other numbers of the same nodes: what
    it solved inside nodes is not solved again.
    """

    request: Request
    solver: Solver = "highs"
    like: InitVar[Search | None] = None
    chain: Chain = field(init=False)
    stage_of: list[int | None] = field(init=False)
    layer: list[bool] = field(init=False)
    modes: tuple[Recompute, ...] = field(init=False)
    least_flops: float = field(init=False)
    _inner: dict[tuple[int, int], Inner | None] = field(default_factory=dict)
    _refused: dict[int, Infeasible] = field(default_factory=dict)

    def __post_init__(self, like: Search | None) -> None:
        if like is not None and _inside(like.request.cluster) == _inside(self.request.cluster):
            most = self.request.cluster.devices_per_node
            self._inner = {key: inner for key, inner in like._inner.items() if key[0] <= most}
        model = self.request.model
        self.request.fix.check_planned()
        self.request.check()
        self.chain = replace(
            Chain.of(model, pinned_types(model)), sequence_split=self.request.fix.sp
        )
        self.stage_of = pinned_stages(model)
        layers = repeated(model)
        self.layer = [i in layers for i in range(len(model.segments))]
        self.least_flops = self.request.least_flops_per_step()
        fixed = self.request.fix.recompute
        self.modes = tuple(mode for mode in MODES if fixed in (None, mode))

    def run(self, top: int = 5, progress: Callable[[str], None] | None = None) -> Found:
        """The `top` best configurations.

        Raises Infeasible, saying what is short and what would fit, where no configuration fits
        the memory.
        """
        began = time.process_time()
        options = candidates(self.request)
        pending = [(self._first_bound(c), False, c) for c in options]
        heapq.heapify(pending)
        total = len(pending)
        done: list[Outcome] = []
        short: list[tuple[float, Candidate]] = []
        bounds: list[float] = []
        useless = 0
        while pending:
            bound, refined, candidate = heapq.heappop(pending)
            if len(done) >= top and bound >= sorted(o.seconds for o in done)[top - 1]:
                bounds.append(bound)  # all that is left is no better than this
                break
            if not refined:
                inner = self.inner(candidate)
                if inner is None:
                    useless += 1
                    continue
                heapq.heappush(
                    pending, (max(bound, self._bound(candidate, inner)), True, candidate)
                )
                continue
            bounds.append(bound)
            if progress is not None:
                progress(f"{candidate.key}: {len(done)} solved, {len(pending)} to go")
            outcome = self.solve(candidate)
            if isinstance(outcome, Outcome):
                done.append(outcome)
            else:
                short.append((outcome.needed_bytes, candidate))
        self._check_refused(options)
        if not done:
            if not short:
                raise InvalidInput(self._useless())
            needed, candidate = min(short)
            if needed == float("inf"):
                raise Infeasible(self._contradiction(candidate))
            raise Infeasible(self._shortage(needed, candidate))
        done.sort(key=lambda o: (o.seconds, o.candidate))
        solved = len(done)
        few = self.request.cluster.nodes <= MOST_MAPPED_NODES
        done = [self._placed(o, search=few) for o in done[:top]]
        done.sort(key=lambda o: (o.seconds, o.candidate))
        tied = [o for o in done if o.seconds <= done[0].seconds * (1 + TIE)]
        chosen = min(tied, key=self._preference)
        done.remove(chosen)
        if chosen.mapping is None and has_choice(self.request.cluster):
            chosen = self._placed(chosen, search=True)
        done.insert(0, chosen)
        methods = Counter(i.method for i in self._inner.values() if i is not None)
        return Found(
            tuple(done[:top]),
            min(*bounds, done[0].seconds),  # on better links than an axis is priced by
            solved,
            total - solved - len(short) - useless,
            len(short) + useless,
            time.process_time() - began,
            dict(methods),
        )

    def _check_refused(self, options: Sequence[Candidate]) -> None:
        """Raises Infeasible, naming the pin, where pins on types hold at no tp that splits: with
        tp=1 they would be kept in name only."""
        wide = [c for c in options if c.tp > 1]
        if self._refused and not any(self.inner(c) is not None for c in wide):
            raise self._refused[max(self._refused)]

    def _preference(self, outcome: Outcome) -> tuple[bool, int, int]:
        fullest = max(stage.total for stage in outcome.memory)
        return fullest > 0.9 * self.request.limit_bytes, outcome.candidate.zero, fullest

    # --- bounds ----------------------------------------------------------------------------------

    def _first_bound(self, candidate: Candidate) -> float:
        """Before anything is solved: all FLOPs at the device's peak, and the bubble."""
        device = self.request.cluster.device
        peak = device.peak(self.request.precision.compute_dtype)
        step = self.least_flops / (self.request.cluster.world_size * peak)
        through = step * candidate.pp / candidate.microbatches
        return _step_bound(through, candidate)

    def _bound(self, candidate: Candidate, inner: Inner) -> float:
        return _step_bound(inner.bound_seconds, candidate)

    # --- one candidate ---------------------------------------------------------------------------

    def mesh(self, candidate: Candidate) -> Mesh:
        """pp, dp and tp with its sub-axes, outermost first."""
        mesh = Mesh.of(pp=candidate.pp, dp=candidate.dp, tp=candidate.tp)
        return mesh.factored("tp", sub_axes(self.request.model, candidate.tp))

    def inner(self, candidate: Candidate) -> Inner | None:
        """The inside of blocks for a candidate's tp and micro-batch, solved once; None where tp
        would split nothing, or pins cannot hold."""
        key = (candidate.tp, candidate.micro_batch)
        if key not in self._inner:
            try:
                inner = self._solved(candidate)
            except Infeasible as error:  # pins that cannot hold at this tp
                self._refused[candidate.tp] = error
                self._inner[key] = None
                return None
            useful = candidate.tp == 1 or splits_anything(inner.axes, inner.annotations)
            if not useful and self.request.fix.tp == candidate.tp:
                # The model is so small that splitting does not pay, but it was asked for.
                local = Cluster.preset("local").resized(self.request.cluster.world_size)
                inner = self._solved(candidate, local)
                useful = splits_anything(inner.axes, inner.annotations)
            self._inner[key] = inner if useful else None
        return self._inner[key]

    def _solved(self, candidate: Candidate, decided_on: Cluster | None = None) -> Inner:
        return solve_inner(
            self.request.model,
            self.chain,
            self.request.cluster,
            self.mesh(candidate),
            expert_binding(
                self.request.model,
                {"b": candidate.micro_batch, "s": self.request.workload.seq_len},
            ),
            self.request.precision,
            tuple(dict.fromkeys(("none", *self.modes))),
            self.solver,
            decided_on,
            self.request.runtime,
        )

    def solve(self, candidate: Candidate) -> Outcome | Shortfall:
        """Cuts the stages of a candidate and prices the step."""
        request, inner = self.request, self.inner(candidate)
        assert inner is not None
        sync = self._sync_per_microbatch(candidate, inner)
        table = self._table(candidate, inner, sync)
        m = candidate.microbatches
        held = [in_flight(candidate, rank) for rank in range(candidate.pp)]
        stages = request.fix.stages
        cut = cut_stages(
            table, held, m, request.limit_bytes, self.stage_of, sync,
            bounds_of(request.model, stages) if stages else None,
        )  # fmt: skip
        if isinstance(cut, Shortfall):
            return cut
        return self._priced(candidate, inner, self._layers_only(cut))

    def _layers_only(self, cut: Cut) -> Cut:
        """A cut whose modes are those of layers; what is no layer is not recomputed."""
        modes = tuple(
            tuple(mode if self.layer[first + i] else "none" for i, mode in enumerate(stage))
            for first, stage in zip(cut.bounds, cut.modes, strict=False)
        )
        return replace(cut, modes=modes)

    def _table(self, candidate: Candidate, inner: Inner, sync: Array) -> SegmentTable:
        """The segments as `cut_stages` wants them: compute slowed by `sync`, the communication of
        each that it hides."""
        request, model = self.request, self.request.model
        slowed = overlap_cost_fraction() * sync
        seconds, kept, workspace = [], [], []
        for mode in self.modes:
            costs = [
                inner.costs[s.block, mode if self.layer[i] else "none"]
                for i, s in enumerate(model.segments)
            ]
            seconds.append([c.seconds for c in costs])
            kept.append([float(c.memory.kept) for c in costs])
            workspace.append([float(c.memory.workspace) for c in costs])
        gather = [
            gather_bytes(sum(inner.local_parameters[s.block]), request.precision,
                         candidate.zero, candidate.dp)
            for s in model.segments
        ]  # fmt: skip
        fixed = [
            float(self._state(candidate, inner.local_parameters[s.block]).total)
            for s in model.segments
        ]
        shared = []
        for name, uses in model.uses().items():
            for first, last in pairwise(uses):
                segment = model.segments[first]
                elements = inner.local_parameters[segment.block][segment.parameters.index(name)]
                shared.append((first, last, float(self._state(candidate, (elements,)).total)))
        return SegmentTable(
            self.modes, np.array(seconds) + slowed, np.array(kept),
            np.array(workspace) + np.array(gather, dtype=np.float64), np.array(fixed),
            tuple(shared),
        )  # fmt: skip

    def _state(self, candidate: Candidate, parameters: tuple[int, ...]) -> StateBytes:
        return rank_state(self.request.precision, candidate, sum(parameters))

    def _sync_per_microbatch(self, candidate: Candidate, inner: Inner) -> Array:
        return np.array(
            [
                data_parallel_sync(
                    self.request.cluster, candidate.data, sum(inner.local_parameters[s.block]),
                    self.request.precision, candidate.zero,
                ).per_microbatch_s
                for s in self.request.model.segments
            ]
        )  # fmt: skip

    def _priced(self, candidate: Candidate, inner: Inner, cut: Cut) -> Outcome:
        price = price_step(self.request, candidate, inner, cut.bounds, cut.modes, exact=False)
        return Outcome(candidate, inner, cut, price.seconds, dict(price.time), price.memory)

    def _placed(self, outcome: Outcome, search: bool) -> Outcome:
        """A finalist, its schedule simulated on the links it uses: with `search` on the nodes that
        suit it best, otherwise on nodes in order."""
        request, candidate, cut = self.request, outcome.candidate, outcome.cut
        mapping, slowdown = None, in_order(request.cluster, candidate)
        if search and slowdown is not None:
            stages = stages_of(request, candidate, outcome.inner, cut.bounds, cut.modes)
            traffic = traffic_of(request, candidate, stages)
            mapping, slowdown = mapped(request.cluster, candidate, traffic)
        price = price_step(
            request, candidate, outcome.inner, cut.bounds, cut.modes, slowdown=slowdown
        )
        return replace(
            outcome,
            seconds=price.seconds,
            time=dict(price.time),
            memory=price.memory,
            mapping=mapping,
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
                other = Search(larger, self.solver)
                options = candidates(larger)
            except InvalidInput:
                continue
            other._inner = self._inner  # the same blocks on the same devices
            smallest = min(c.micro_batch for c in options)
            thrifty = [c for c in options if c.micro_batch == smallest]
            if any(other._may_fit(c) and isinstance(other.solve(c), Outcome) for c in thrifty):
                return nodes
        return None

    def _may_fit(self, candidate: Candidate) -> bool:
        """Whether a stage could hold its share of the state, and some stage every segment."""
        inner = self.inner(candidate)
        if inner is None:
            return False
        table = self._table(candidate, inner, np.zeros(len(self.layer)))
        tied = sum(size for _, _, size in table.shared)
        share = (table.fixed.sum() - tied) / candidate.pp
        alone = table.fixed + (table.kept + table.workspace).min(axis=0)
        return bool(max(share, alone.max()) <= self.request.limit_bytes)


def _inside(cluster: Cluster) -> Hashable:
    """All that what happens inside a node depends on."""
    levels = [at for at in cluster.worst_levels if at.span_devices <= cluster.devices_per_node]
    return cluster.device, cluster.devices_per_node, tuple(levels), cluster.curves


def _nodes(count: int, devices: int) -> str:
    return f"{count} node{'s' * (count > 1)} of {devices} device{'s' * (devices > 1)}"


def _step_bound(through_seconds: float, candidate: Candidate) -> float:
    """The least a step takes whose microbatches take `through_seconds` for the whole model."""
    m = candidate.microbatches
    return float(through_seconds / -np.expm1(candidate.pp * np.log1p(-1 / m)) if m > 1
                 else through_seconds)  # fmt: skip
