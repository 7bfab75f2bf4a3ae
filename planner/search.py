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
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from itertools import count

import numpy as np

from ..costmodel.spending import Spending
from ..ir.plan import MODEL_CHANGES
from .bounds import Shares, distinct_of, step_floor_seconds, variant_floors
from .candidates import Candidate
from .inner import Inner
from .linear_program import Solver
from .relax import infeasible
from .request import Request
from .solving import Outcome, Solving
from .space import allowed, counts, heads, schedules
from .traffic import has_choice

TIE = 1e-3
"""Plans this close are equally good. Of these the lowest ZeRO stage is taken that leaves a tenth of
the memory free: communication that is hidden on paper is not always hidden."""
MOST_MAPPED_NODES = 16
"""Nodes up to which every finalist is mapped; on more only the best one, the others in order."""
_ENOUGH = 1.03
"""Of what the estimates of the configurations wanted come to: bounds above that are not worked out,
as simulations come within."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search returns: outcomes from the best on, and what was done to get there.

    `bound` is below what every configuration of the space spends, whether solved or not: seconds of
    a step, or the unit of another objective. Without outcomes where all spend more than the limit
    that was given, or none fits: `short` are then the bytes that candidates need on a device, not a
    number where nobody has counted.
    """

    outcomes: tuple[Outcome, ...]
    bound: float
    solved: int
    pruned: int
    infeasible: int
    seconds: float
    methods: dict[str, int]
    spending: Spending
    interrupted: bool = False
    short: tuple[tuple[float, Candidate], ...] = ()

    def spent(self, outcome: Outcome) -> float:
        """What a step of an outcome spends."""
        return self.spending.of(outcome.seconds, outcome.busy_seconds)


@dataclass(slots=True)
class _Course:
    """How far a search has come: what became of the variants that there are, the bytes that those
    need which do not fit, and the bounds of those that were given up unproved."""

    variants: int = 0
    infeasible: int = 0
    solved: list[Outcome] = field(default_factory=list)
    short: list[tuple[float, Candidate]] = field(default_factory=list)
    unproved: list[float] = field(default_factory=list)


Entry = tuple[float, int, Candidate, Outcome | None]
"""Of the queue: what is spent at least, how far the candidate has come, and what it came to."""


@dataclass(slots=True)
class Search:
    """One run of the search.

    `like` is an earlier search for the same model and work on other numbers of the same nodes: what
    it solved inside nodes is not solved again. `anything`: configurations that no backend emits yet
    count as well. `objective` is what is least in what is found: `time`, `cost` or `energy` of a
    step on all of the devices.
    """

    request: Request
    solver: Solver = "highs"
    anything: bool = False
    objective: str = "time"
    like: InitVar[Search | None] = None
    solving: Solving = field(init=False)
    spending: Spending = field(init=False)
    least_flops: float = field(init=False)

    def __post_init__(self, like: Search | None) -> None:
        known = None if like is None else like.solving
        self.solving = Solving(self.request, self.solver, known, self.anything)
        self.spending = Spending.on(self.objective, self.request.hardware or self.request.cluster)
        self.least_flops = self.request.least_flops_per_step

    def run(self, top: int = 5, progress: Callable[[str], None] | None = None) -> Found:
        """The `top` best configurations.

        Raises Infeasible, saying what is short and what would fit, where no configuration fits
        the memory. Interrupted (KeyboardInterrupt), it returns the best so far.
        """
        found = self.attempt(top, progress)
        if found.interrupted and not found.outcomes:
            raise KeyboardInterrupt
        if not found.outcomes:
            raise infeasible(self.solving, self.anything, found.short)
        return found

    def attempt(
        self,
        top: int = 5,
        progress: Callable[[str], None] | None = None,
        limit: float = float("inf"),
    ) -> Found:
        """The same of those that spend `limit` at most; where there are none, or it is interrupted
        before one is solved, it says so with no outcomes."""
        began = time.process_time()
        every = [head for head in heads(self.request) if counts(head, self.anything)]
        order = count()
        queue: list[tuple[float, int, int, Candidate, Outcome | None]] = [
            (self._flops_floor(head), next(order), 0, head, None) for head in every
        ]
        heapq.heapify(queue)
        course, finals = _Course(), list[Outcome]()
        interrupted, at_work = False, float("inf")
        few = self.request.cluster.nodes <= MOST_MAPPED_NODES
        try:
            while queue and len(finals) < top and queue[0][0] <= limit:
                bound, _, level, candidate, outcome = heapq.heappop(queue)
                found: list[Entry] = []
                at_work = bound  # nobody's bound any more if it is interrupted now
                if level == 0:
                    floor = bound if limit == float("inf") else self._untyped(candidate, bound)
                    if floor <= limit:
                        found = self._typed(candidate, bound)
                    else:
                        found = [(floor, 0, candidate, None)]
                elif level == 1:
                    found = self._varied(candidate, bound, course, top)
                elif level == 2:
                    if progress is not None:
                        solved = len(course.solved)
                        progress(f"{candidate.key}: {solved} solved, {len(queue)} to go")
                    found = self._solved(candidate, bound, course)
                elif level == 3:
                    assert outcome is not None
                    placed = self.solving.placed(outcome, search=few)
                    found = [(self._spent(placed), 4, candidate, placed)]
                else:
                    assert outcome is not None
                    finals.append(outcome)
                for key, at, each, what in found:
                    heapq.heappush(queue, (key, next(order), at, each, what))
        except KeyboardInterrupt:
            interrupted = True
            course.unproved.append(at_work)
            simulated = [o for *_, level, _, o in queue if level == 4 and o is not None]
            finals += sorted(simulated, key=self._spent)
            if not finals and course.solved:
                best = min(course.solved, key=self._spent)
                finals.append(self.solving.placed(best, search=False))
        if not interrupted:
            self._check_refused(every)
        least = min(map(self._spent, finals), default=limit)
        open_floors = [
            key if outcome is None else self._floor(outcome, least)
            for key, _, _, _, outcome in queue
        ]
        return self._found(finals[:top], open_floors, course, interrupted, began)

    def _found(
        self,
        finals: list[Outcome],
        open_floors: Sequence[float],
        course: _Course,
        interrupted: bool,
        began: float,
    ) -> Found:
        floors = [self._least(outcome.floor_seconds, outcome.candidate) for outcome in finals]
        floors += [*open_floors, *course.unproved]
        outcomes = tuple(finals)
        if finals:
            best = self._spent(finals[0])
            tied = [o for o in finals if self._spent(o) <= best * (1 + TIE)]
            chosen = min(tied, key=self._preference)
            others = [o for o in finals if o is not chosen]
            if (
                chosen.mapping is None
                and has_choice(self.request.cluster)
                and self.solving.sites.alike
            ):
                chosen = self.solving.placed(chosen, search=True)
            floors.append(self._spent(chosen))
            outcomes = (chosen, *others)
        return Found(
            outcomes,
            min(floors, default=float("inf")),
            len(course.solved),
            course.variants - len(course.solved) - course.infeasible,
            course.infeasible,
            time.process_time() - began,
            dict(Counter(self.solving.insides.methods())),
            self.spending,
            interrupted,
            () if finals else tuple(course.short),
        )

    # --- one step of the search ------------------------------------------------------------------

    def _untyped(self, head: Candidate, bound: float) -> float:
        """The bound of a set of degrees whose blocks have no types yet: less than those cost, and
        enough where tp splits little."""
        views, insides = set(self.solving.sites.views(head)), self.solving.insides
        through = min(insides.least_seconds(head, view) for view in views)
        each = [
            replace(head, schedule=name, vpp=vpp) for name, vpp in schedules(self.request, head)
        ]
        floors = [
            step_floor_seconds(through, one, Shares(1.0, 0.0))
            for one in each
            if counts(one, self.anything)
        ]
        return max(bound, self.spending.of(min(floors), 0.0)) if floors else bound

    def _typed(self, head: Candidate, bound: float) -> list[Entry]:
        """A set of degrees whose blocks are typed now."""
        inners = self.solving.inners(head)
        if inners is None:
            return []
        through = min(self._through(inner) for inner in distinct_of(inners))
        shares = Shares.of(self.request, inners)
        each = [
            replace(head, schedule=name, vpp=vpp) for name, vpp in schedules(self.request, head)
        ]
        floors = [
            step_floor_seconds(through, one, shares) for one in each if counts(one, self.anything)
        ]
        return [(max(bound, self._least(min(floors), head)), 1, head, None)] if floors else []

    def _varied(self, head: Candidate, bound: float, course: _Course, top: int) -> list[Entry]:
        """Its variants, each with its bound, as far as that may matter: bounds above what as many
        as are wanted are estimated to spend are not worked out. One that could be better than all
        that are solved, and has no stages to cut, is solved at once, as a measure for the next."""
        inners, options = self.solving.inners(head), allowed(self.request, head, self.anything)
        assert inners is not None
        if not options:
            return []
        course.variants += len(options)
        known = sorted(map(self._spent, course.solved))[:top]
        enough = _ENOUGH * known[-1] if len(known) == top else float("inf")
        floors = variant_floors(self.request, options, inners, self._seconds_of(enough, head))
        never = ~np.isfinite(floors)
        course.infeasible += int(never.sum())
        if never.any():  # remembered in case nothing fits anywhere
            thriftiest = options[max(i for i in np.flatnonzero(never))]
            course.short.append((float("nan"), thriftiest))
        found: list[Entry] = sorted(
            (max(bound, self._least(float(floor), each)), 2, each, None)
            for floor, each in zip(floors, options, strict=True)
            if np.isfinite(floor)
        )
        quick = next((i for i, entry in enumerate(found) if entry[2].pp == 1), None)
        if quick is not None and found[quick][0] < min(known, default=float("inf")):
            floor, _, candidate, _ = found[quick]
            found[quick : quick + 1] = self._solved(candidate, floor, course)
        return found

    def _solved(self, candidate: Candidate, bound: float, course: _Course) -> list[Entry]:
        """A variant whose stages are cut now; nothing where none of it fits."""
        cut = self.solving.solve(candidate, self._seconds_of(bound, candidate))
        if isinstance(cut, Outcome):
            course.solved.append(cut)
            return [(max(bound, self._spent(cut)), 3, candidate, cut)]
        course.infeasible += 1
        course.short.append((cut.needed_bytes, candidate))
        course.unproved += [] if cut.proved else [bound]
        return []

    def _check_refused(self, every: Sequence[Candidate]) -> None:
        """Raises Infeasible, naming the pin, where pins on types hold at no tp that splits: with
        tp=1 they would be kept in name only."""
        refused = self.solving.insides.refused
        wide = [head for head in every if head.tp > 1]
        if refused and not any(self.solving.inners(head) is not None for head in wide):
            raise refused[max(refused)]

    def _preference(self, outcome: Outcome) -> tuple[int, bool, int, int]:
        fullest = max(stage.total for stage in outcome.memory)
        changes = sum(getattr(outcome.candidate, name) > 0 for name in MODEL_CHANGES)
        return changes, fullest > 0.9 * self.request.limit_bytes, outcome.candidate.zero, fullest

    # --- bounds ----------------------------------------------------------------------------------

    def _least(self, step_s: float, candidate: Candidate) -> float:
        """What a step of a typed candidate spends at least, that takes so many seconds at least."""
        return self.spending.of(step_s, self._busy_floor(candidate))

    def _seconds_of(self, bound: float, candidate: Candidate) -> float:
        """The seconds behind what `_least` makes of them."""
        return (bound - self._least(0.0, candidate)) / self.spending.per_second

    def _busy_floor(self, candidate: Candidate) -> float:
        """The seconds that a device computes at least, on average: nothing is recomputed."""
        if not self.spending.per_busy_second:
            return 0.0
        inners = self.solving.inners(candidate)
        assert inners is not None
        least: dict[str, float] = {}
        for inner in distinct_of(inners):
            for (block, _), cost in inner.costs.items():
                busy = cost.forward.compute_s + cost.backward.compute_s
                least[block] = min(least.get(block, float("inf")), busy)
        total = sum(n * least[block] for block, n in self.request.model.counts.items())
        return candidate.microbatches * total / candidate.pp

    def _spent(self, outcome: Outcome) -> float:
        return self.spending.of(outcome.seconds, outcome.busy_seconds)

    def _floor(self, outcome: Outcome, best: float) -> float:
        """What no cut of a solved candidate can undercut. Where only the estimate is between it and
        the best, it is simulated."""
        candidate = outcome.candidate
        floor = self._least(outcome.floor_seconds, candidate)
        if candidate.vpp > 1 and floor < min(best, self._spent(outcome)):
            placed = self.solving.placed(outcome, search=False)
            return self._least(placed.floor_seconds, candidate)
        return floor

    def _flops_floor(self, candidate: Candidate) -> float:
        """What is spent before anything is solved: all FLOPs at the device's peak."""
        step = self.least_flops / self.request.peak_flops_per_s
        if not self.anything and candidate.pp > 1:
            through = step * candidate.pp / candidate.microbatches
            step = step_floor_seconds(through, candidate, Shares(1.0, 0.0))
        hardware = self.request.hardware or self.request.cluster
        dtype = self.request.precision.compute_dtype
        fastest = max(device.peak(dtype) for device in hardware.device_kinds)
        return self.spending.of(step, self.least_flops / (hardware.world_size * fastest))

    def _through(self, inner: Inner) -> float:
        """The least seconds of a microbatch through the whole model."""
        least: dict[str, float] = {}
        for (block, _), cost in inner.costs.items():
            least[block] = min(least.get(block, float("inf")), cost.seconds)
        return sum(count * least[block] for block, count in self.request.model.counts.items())
