"""What no cut into stages can beat: admissible bounds of all variants of a set of degrees at once.

The design's bound, `max_s [m·T_s + Σ_{i<s} T_i]`, under each rank's memory. Its relaxation: layers
of the commonest block are a fluid that every stage takes as much of as its time and memory allow,
none, some or all of it recomputed; the first and the last segment lie where they must, segments of
other kinds take time and no memory. The least time at which all of the model is taken is the bound.

Of schedules with one stage on each rank more is known (`costmodel.pipeline`: `least_passes`,
`least_paces`, `halved_paces`): a step takes so many times what one microbatch takes through all
stages, so that seconds are shared out where they bring most: first to layers that keep their
activations, then to those that recompute.

Ranks with virtual stages have what the first stages of the ranks before them leave of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..costmodel.memory import BUFFERED_BLOCKS
from ..costmodel.overlap import overlap_cost_fraction
from ..costmodel.pipeline import halved_paces, least_paces, least_passes
from ..costmodel.steptime import accumulation_seconds, optimizer_step_seconds
from ..ir.plan import Recompute, ScheduleName
from .candidates import Candidate, placement_of
from .footprint import Parameters, gathered_bytes, held_state, in_flight_by_rank
from .inner import Inner
from .request import Request, repeated
from .stages import PipelineFloor
from .step import sync_seconds, transfer_seconds
from .virtual_stages import layers_before

Array = NDArray[np.float64]

_HALVINGS = 11
"""Of the interval in which the bound lies, which is at first as wide as the bound itself."""


def step_floor_seconds(through_s: float, candidate: Candidate, shares: Shares) -> float:
    """The least a step takes whose microbatches take `through_s` for the whole model, in stages of
    any size. With virtual stages the work alone is left."""
    m, pp = candidate.microbatches, candidate.pp
    alone = max(m * through_s / pp, through_s)
    if candidate.vpp > 1 or pp == 1:
        return alone
    passes = floor_of(candidate, shares, 0.0).passes
    return max(alone, through_s * passes - pp * shares.excess_s)


@dataclass(frozen=True, slots=True)
class Shares:
    """What of a layer's time its forward pass takes at most, and its gradients of weights. Other
    segments may take more for these: `excess_s` together, at most."""

    forward: float
    weights: float
    excess_s: float = 0.0

    @staticmethod
    def of(request: Request, inners: Sequence[Inner]) -> Shares:
        """Those of the commonest block that keeps its activations."""
        layer, kinds = commonest_block(request), distinct_of(inners)
        costs = [inner.costs[layer, "none"] for inner in kinds]
        forward = max(cost.forward.total_s / cost.seconds for cost in costs)
        weights = max(cost.weights_s / cost.seconds for cost in costs)
        excess = 0.0
        for block, count in request.model.counts.items():
            more = [
                max(0.0, cost.forward.total_s - forward * cost.seconds)
                + max(0.0, cost.weights_s - weights * cost.seconds)
                for cost in (inner.costs[block, "none"] for inner in kinds)
            ]
            excess += count * max(more) * (block != layer)
        return Shares(forward, weights, excess)


def floor_of(candidate: Candidate, shares: Shares, transfer_s: float) -> PipelineFloor:
    """What bounds the schedule of a candidate with one stage on each rank."""
    m, pp = candidate.microbatches, candidate.pp
    excess = pp * shares.excess_s * (pp > 1)
    if candidate.schedule == "zb-h1":
        paces = halved_paces(pp, m, shares.forward, shares.weights)
        passed = 1 - shares.weights
        # ΣT is shared out so that all stages end together
        passes = passed + (1 / np.sum(1 / paces) if (paces > 0).all() else 0.0)
        sent = 2 * (pp - 1) * transfer_s
        return PipelineFloor(m, float(passes), paces, passed, sent, excess)
    rounds = 1 if candidate.schedule == "gpipe" else 1 + (m - 1) // pp
    return PipelineFloor(
        m, least_passes(pp, m, shares.forward), least_paces(pp, m, shares.forward), 1.0,
        2 * (pp - 1) * rounds * transfer_s, excess,
    )  # fmt: skip


def variant_floors(
    request: Request,
    options: Sequence[Candidate],
    inners: Sequence[Inner],
    enough_s: float = float("inf"),
) -> Array:
    """A lower bound for each of `options`, which differ in schedule, ZeRO and its group alone;
    `inners` are the insides of blocks as each pipeline rank has them. inf where memory is too
    small for any cut. What lies above `enough_s` is not worked out: it is given as that."""
    share = Shares.of(request, inners).forward
    parts = {id(inner): _Load.of(request, options, inner, share) for inner in distinct_of(inners)}
    loads = [parts[id(inner)] for inner in inners]
    fluid = _Fluid(request, options, inners, loads)
    # whatever the memory, all work has to be done
    through = np.min([load.through_s[0] for load in parts.values()], axis=0)
    low = np.array([
        step_floor_seconds(float(seconds), each, fluid.shares)
        for each, seconds in zip(options, through, strict=True)
    ])  # fmt: skip
    high = 2.5 * low
    never = ~fluid.takes_all(np.full(len(options), np.inf))
    late = never.copy()
    if enough_s < np.inf and not never.all():
        late |= ~fluid.takes_all(enough_s + fluid.excess_s - fluid.afterwards_s)
    for _ in range(0 if late.all() else _HALVINGS):
        middle = (low + high) / 2
        enough = fluid.takes_all(middle)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    floors = low - fluid.excess_s + fluid.afterwards_s
    return np.where(never, np.inf, np.where(late, np.maximum(floors, enough_s), floors))


def afterwards_seconds(request: Request, candidate: Candidate, inner: Inner) -> float:
    """The least that the optimizer takes on the rank that has most to update."""
    held = Parameters.of(request, inner, 0, len(request.model.segments))
    elements = held.sharded(candidate) / candidate.pp
    return optimizer_step_seconds(inner.cluster.device, elements, request.precision)


@dataclass(frozen=True, slots=True)
class _Load:
    """A layer of the commonest block, and the ends of the model, on one kind of rank.

    Arrays are [1 or ranks, variants]: seconds of a layer in each mode, the bytes that it keeps, and
    that stages with some of it need for what passes through; its bytes of state, buffers beside
    them and the least workspace, seconds and bytes of the first and of the last segment, seconds
    through the whole model; seconds of ZeRO's communication of a layer and of the ends, which runs
    beside compute and which a stage takes at least.
    """

    seconds: dict[Recompute, Array]
    kept: dict[Recompute, Array]
    passing: dict[Recompute, Array]
    state: Array
    buffers: Array
    ends_s: tuple[Array, Array]
    ends_bytes: tuple[Array, Array]
    ends_kept: tuple[Array, Array]
    through_s: Array
    waits: Array
    ends_waits: tuple[Array, Array]
    forward_share: Array

    @property
    def quickest(self) -> Array:
        """Seconds of a layer in its fastest mode."""
        return np.asarray(np.min(list(self.seconds.values()), axis=0))

    @staticmethod
    def stacked(loads: Sequence[_Load]) -> _Load:
        """Those of ranks of several kinds, one row each."""

        def rows(of: Callable[[_Load], Array]) -> Array:
            return np.concatenate([of(load) for load in loads])

        def each(of: Callable[[_Load], dict[Recompute, Array]]) -> dict[Recompute, Array]:
            """By mode; a rank without one has its last in its place."""
            modes = dict.fromkeys(mode for load in loads for mode in load.seconds)
            found: dict[Recompute, Array] = {}
            for mode in modes:
                own = [mode if mode in load.seconds else list(load.seconds)[-1] for load in loads]
                found[mode] = np.concatenate(
                    [of(load)[m] for load, m in zip(loads, own, strict=True)]
                )
            return found

        return _Load(
            each(lambda load: load.seconds),
            each(lambda load: load.kept),
            each(lambda load: load.passing),
            rows(lambda load: load.state),
            rows(lambda load: load.buffers),
            (rows(lambda load: load.ends_s[0]), rows(lambda load: load.ends_s[1])),
            (rows(lambda load: load.ends_bytes[0]), rows(lambda load: load.ends_bytes[1])),
            (rows(lambda load: load.ends_kept[0]), rows(lambda load: load.ends_kept[1])),
            rows(lambda load: load.through_s),
            rows(lambda load: load.waits),
            (rows(lambda load: load.ends_waits[0]), rows(lambda load: load.ends_waits[1])),
            rows(lambda load: load.forward_share),
        )

    @staticmethod
    def of(request: Request, options: Sequence[Candidate], inner: Inner, share: float) -> _Load:
        """`share`: what of a layer's time its forward pass takes at most, where that counts."""
        virtual = np.array([each.vpp > 1 for each in options])
        model = request.model
        modes = list(dict.fromkeys(mode for _, mode in inner.costs))
        if request.fix.recompute is not None:
            modes = [mode for mode in modes if mode == request.fix.recompute]
        counts = model.counts
        layer = commonest_block(request)
        ends = model.segments[0].block, model.segments[-1].block
        waits = _waits(request, options, inner)

        ways = {each.sharing: each for each in options}
        way_of = [list(ways).index(each.sharing) for each in options]

        def per_way(of: Callable[[Candidate], float]) -> Array:
            """What depends on how state is shared out alone."""
            return np.array([of(each) for each in ways.values()], np.float64)[None, way_of]

        def seconds(block: str, mode: Recompute) -> Array:
            cost, plain = inner.costs[block, mode], inner.costs[block, "none"]
            least = np.where(virtual, cost.seconds, cost.least_seconds(plain, share))
            return np.asarray(least + added(block) + overlap_cost_fraction() * waits[block])

        def number(value: float) -> Array:
            return np.full((1, 1), value)

        def least(block: str) -> Array:
            plain: list[Recompute] = ["none"]
            every = [seconds(block, mode) for mode in (modes if block == layer else plain)]
            return np.asarray(np.min(every, axis=0))

        def added(block: str) -> float:
            if options[0].microbatches == 1 or request.runtime.fused_accumulation:
                return 0.0
            return accumulation_seconds(
                inner.cluster.device, sum(inner.local_parameters[block]), request.precision,
                request.runtime.gradient_bytes,
            )  # fmt: skip

        def state(block: str) -> Array:
            sizes = inner.parameters_of(model.blocks[block], block)
            return per_way(lambda each: held_state(request, each, *sizes).total)

        cost = inner.costs[layer, modes[0]]
        return _Load(
            {mode: seconds(layer, mode) for mode in modes},
            {mode: number(inner.costs[layer, mode].memory.kept) for mode in modes},
            {mode: number(BUFFERED_BLOCKS * inner.costs[layer, mode].memory.offloaded)
             for mode in modes},
            state(layer),
            per_way(lambda each: gathered_bytes(request, each, inner, [layer]))
            + _least_workspace(request, inner, modes),
            (seconds(ends[0], "none"), seconds(ends[1], "none")),
            (state(ends[0]), state(ends[1])),
            (number(inner.costs[ends[0], "none"].memory.kept),
             number(inner.costs[ends[1], "none"].memory.kept)),
            np.maximum(
                sum((n * least(b) for b, n in counts.items()), np.zeros((1, len(options)))),
                sum((n * waits[b] for b, n in counts.items()), np.zeros((1, len(options)))),
            ),
            waits[layer],
            (waits[ends[0]], waits[ends[1]]),
            number(cost.forward.total_s / cost.seconds if cost.seconds else 1.0),
        )  # fmt: skip


def commonest_block(request: Request) -> str:
    """The block that is called most often."""
    counts = request.model.counts
    return max(counts, key=lambda block: counts[block])


def _least_workspace(request: Request, inner: Inner, modes: Sequence[Recompute]) -> int:
    """Bytes that the last block of a stage needs at least while it runs: its microbatch has freed
    nothing yet. A stage of the first segment alone has no layers to bound."""
    plain: list[Recompute] = ["none"]
    layers = repeated(request.model)
    own = [segment.block for i, segment in enumerate(request.model.segments) if i in layers]
    rest = {segment.block for segment in request.model.segments[1:]}
    return min(
        (inner.costs[block, mode].memory.workspace
         for block in rest for mode in (modes if block in own else plain)),
        default=0,
    )  # fmt: skip


def _waits(request: Request, options: Sequence[Candidate], inner: Inner) -> dict[str, Array]:
    """Seconds of communication per microbatch of one call of every block, at the rate of the
    largest message there could be: that of all parameters of the model at once."""
    counts = request.model.counts
    sizes = {block: inner.parameters_of(request.model.blocks[block], block) for block in counts}
    whole = [sum(counts[block] * sizes[block][kind] for block in counts) for kind in (0, 1)]
    rates: dict[tuple[int, int, int, int, int], tuple[float, float]] = {}
    for each in options:
        if (key := each.sharing) not in rates:
            dense, experts = (
                sync_seconds(request, each, inner.cluster, *only).per_microbatch_s
                for only in ((whole[0], 0), (0, whole[1]))
            )
            rates[key] = dense / max(1, whole[0]), experts / max(1, whole[1])
    every = np.array([rates[each.sharing] for each in options])
    return {block: (every @ np.array(sizes[block], np.float64))[None, :] for block in counts}


class _Fluid:
    """The relaxation, for all variants of a set of degrees at once: arrays [ranks, variants]."""

    def __init__(
        self,
        request: Request,
        options: Sequence[Candidate],
        inners: Sequence[Inner],
        loads: Sequence[_Load],
    ) -> None:
        head, distinct = options[0], distinct_of(inners)
        self.m, self.pp = head.microbatches, head.pp
        self.load = loads[0] if len(distinct) == 1 else _Load.stacked(loads)
        self.virtual = np.array([each.vpp > 1 for each in options])
        self.shares = Shares.of(request, inners)
        self.excess_s = self.pp * self.shares.excess_s * (self.pp > 1) * ~self.virtual
        plain = {
            schedule: floor_of(replace(head, schedule=schedule, vpp=1), self.shares, 0.0)
            for schedule in dict.fromkeys(each.schedule for each in options if each.vpp == 1)
        }
        one = plain.get("1f1b") or next(iter(plain.values()), floor_of(head, self.shares, 0.0))
        floors = [plain.get(each.schedule, one) for each in options]
        self.passes = np.array([floor.passes for floor in floors])
        self.paces = np.array([floor.paces for floor in floors]).T
        self.passed = np.array([floor.share for floor in floors])
        schedules = {(each.schedule, each.vpp): each for each in options}
        column = [list(schedules).index((each.schedule, each.vpp)) for each in options]
        held = np.array([in_flight_by_rank(each) for each in schedules.values()])
        self.in_flight = held.T[:, column]
        layer, blocks = commonest_block(request), [s.block for s in request.model.segments]
        self.wanted = float(blocks.count(layer))
        ends = np.zeros((2, self.pp, len(options)))
        ends[0, 0] = blocks[0] != layer
        last = np.array([placement_of(each)[-1] for each in schedules.values()])[column]
        ends[1, last, np.arange(len(options))] = blocks[-1] != layer
        limits = [float(inner.cluster.device.memory_limit_bytes) for inner in inners]
        self.room, self.other_s = np.array(limits)[:, None] - self.load.buffers, np.zeros(())
        self.other_waits_s = np.zeros(())
        for here, seconds, size, kept, waits in zip(
            ends, self.load.ends_s, self.load.ends_bytes, self.load.ends_kept,
            self.load.ends_waits, strict=True,
        ):  # fmt: skip
            self.room = self.room - here * (size + self.in_flight * kept)
            self.other_s = self.other_s + here * seconds
            self.other_waits_s = self.other_waits_s + here * waits
        self.room = np.maximum(self.room, 0.0)
        pipes = [transfer_seconds(request, head, inner.carried_bytes[layer]) for inner in distinct]
        sent = 2 * min(pipes) * np.arange(self.pp) if self.pp > 1 else np.zeros(1)
        reached = self._reach(request, distinct, schedules)[:, column]
        halved = np.array([each.schedule == "zb-v" for each in options])
        self.before_s = np.where(halved, self._forward_share(distinct, layer), 1.0) * reached
        self.before_s = self.before_s + sent[:, None]
        ways = {each.sharing: each for each in options}
        after = {
            key: min(afterwards_seconds(request, each, inner) for inner in distinct)
            for key, each in ways.items()
        }
        self.afterwards_s = np.array([after[each.sharing] for each in options])

    @staticmethod
    def _forward_share(inners: Sequence[Inner], layer: str) -> float:
        """The forward's part of a layer in whichever mode it is least: only forwards pass before a
        rank of a schedule with halved backwards can work."""
        return min(
            cost.forward.total_s / cost.seconds
            for inner in inners
            for (block, _), cost in inner.costs.items()
            if block == layer
        )

    def _reach(
        self,
        request: Request,
        inners: Sequence[Inner],
        schedules: Mapping[tuple[ScheduleName, int], Candidate],
    ) -> Array:
        """[ranks, schedules]: before a rank with virtual stages has something to do, the first
        stages of the ranks before it have worked: each of one segment at least, and together of no
        fewer layers than `virtual_stages` leaves them."""
        layers, blocks = repeated(request.model), [s.block for s in request.model.segments]
        least: dict[str, float] = {}
        for inner in inners:
            for (block, _), cost in inner.costs.items():
                least[block] = min(least.get(block, cost.seconds), cost.seconds)
        passed = np.append(0.0, np.cumsum([least[block] for block in blocks]))
        found = np.zeros((self.pp, len(schedules)))
        for column, (_, vpp) in enumerate(schedules):
            for rank in range(1, self.pp) if vpp > 1 else ():
                before = layers_before(layers.count, self.pp * vpp, rank)
                found[rank, column] = passed[max(rank, layers.first * (before > 0) + before)]
        return found

    def takes_all(self, step_s: Array) -> NDArray[np.bool_]:
        """Whether the stages of a step that takes so long can take all layers."""
        alone = self._alone(step_s) if self.virtual.any() else self.passes
        shared = self._shared(step_s) if not self.virtual.all() else self.passes
        layers = np.where(self.virtual, alone, shared)
        found: NDArray[np.bool_] = layers >= self.wanted * (1 - 1e-9)
        return found

    def _alone(self, step_s: Array) -> Array:
        """Layers that ranks with virtual stages can take, each in what the first stages of those
        before it leave of the step."""
        time = (step_s - self.before_s) / self.m
        layers = _capacity(self.load, time - self.other_s, self.room, self.in_flight)[0]
        found: Array = np.floor(np.minimum(layers, self._while_waiting(time)) + 1e-9).sum(axis=0)
        return found

    def _while_waiting(self, time: Array) -> Array:
        """The most layers whose communication beside compute a stage can have in `time`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            most = np.maximum(time - self.other_waits_s, 0.0) / self.load.waits
        return np.where(self.load.waits > 0, most, np.inf)

    def _shared(self, step_s: Array) -> Array:
        """Layers that fit the seconds of all stages together, each with a pace of its own: first
        those that are as fast as any, then as many as the rest of the seconds brings at best."""
        spare = np.maximum(step_s - self.passed * self.load.through_s.min(axis=0), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            pace = np.where(self.paces > 0, spare / self.paces, np.inf)
            pace = np.minimum(pace, step_s / self.m)
            layers, free, rate = _capacity(
                self.load, pace - self.other_s, self.room, self.in_flight
            )
            layers = np.minimum(layers, self._while_waiting(pace))
            free = np.minimum(free, layers)
            total = step_s / self.passes - self.other_s.sum(axis=0)
            left = np.maximum(total - (free * self.load.quickest).sum(axis=0), 0.0)
            more = np.where(np.isfinite(left), left * rate.max(axis=0), np.inf)
        most = np.floor(layers + 1e-9).sum(axis=0)
        by_time = np.maximum(total, 0.0) / self.load.quickest.min(axis=0)
        found: Array = np.minimum(np.minimum(free.sum(axis=0) + more, most), by_time)
        return found


def distinct_of(inners: Sequence[Inner]) -> list[Inner]:
    """The different ones, in order."""
    return list({id(inner): inner for inner in inners}.values())


def _capacity(load: _Load, time: Array, room: Array, alive: Array) -> tuple[Array, Array, Array]:
    """Of every stage: the most layers that it can take in `time` and `room`; how many layers fit
    that are as fast as any; and the most layers that a second brings once these are taken."""
    time = np.maximum(time, 0.0)
    best, free, rate = (np.zeros(np.broadcast_shapes(time.shape, room.shape)) for _ in range(3))
    modes, quickest = list(load.seconds), load.quickest
    with np.errstate(divide="ignore", invalid="ignore"):
        for at, cheap in enumerate(modes):
            fast, full = load.seconds[cheap], load.state + alive * load.kept[cheap]
            inside = np.maximum(room - load.passing[cheap], 0.0)
            by_time, alone = time / fast, np.where(full > 0, inside / full, np.inf)
            best = np.maximum(best, np.minimum(by_time, alone))
            as_fast = fast <= quickest * (1 + 1e-12)
            free = np.maximum(free, np.where(as_fast, alone, 0.0))
            rate = np.maximum(rate, np.where(as_fast, 0.0, 1 / fast))
            for dear in modes[at + 1 :]:
                saved = alive * (load.kept[cheap] - load.kept[dear])
                more = load.seconds[dear] - fast
                trades = (saved > 0) & (more >= 0)  # else one is better in both, and all is in it
                if not trades.any():
                    continue
                slope = fast + full * more / saved
                inside = np.maximum(room - load.passing[dear], 0.0)
                mixed = (time + inside * more / saved) / slope
                least = load.state + alive * load.kept[dear]
                most = np.where(least > 0, inside / least, np.inf)
                both = np.minimum(np.minimum(by_time, mixed), most)
                best = np.maximum(best, np.where(trades, both, 0.0))
                rate = np.maximum(rate, np.where(trades, 1 / slope, 0.0))
    return best, free, rate
