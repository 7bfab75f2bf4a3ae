"""Small chains whose memory binds: every cut, and every choice of what to recompute, one by one.

What a stage needs beside what it keeps depends on which of its segments recompute and in what
order, which `stages` knows only roughly. A chain of a few segments is cut exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, product

from ..ir.plan import Recompute
from .candidates import Candidate, placement_of
from .footprint import fits, rank_bytes
from .inner import Inner
from .request import Request, bounds_of, repeated
from .stages import Cut, windows
from .step import price_step
from .virtual_stages import even_enough

MOST_SEGMENTS = 8
"""Segments of the longest chain that is cut so."""


def best_cut(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    modes: Sequence[Recompute],
    stage_of: Sequence[int | None],
) -> Cut | None:
    """The cut whose estimated step is least, with at most two recompute modes on a rank; None where
    none fits the memory."""
    best: tuple[float, Cut] | None = None
    known: dict[tuple[int, tuple[int, ...]], tuple[Recompute, ...] | None] = {}
    for bounds in _every_bounds(request, candidate, stage_of):
        chosen = _fastest(request, candidate, inners, bounds, modes, known)
        if chosen is None:
            continue
        seconds = price_step(request, candidate, inners, bounds, chosen, exact=False).seconds
        if best is None or seconds < best[0]:
            best = seconds, Cut(bounds, tuple(map(tuple, chosen)), (seconds,))
    return None if best is None else best[1]


def _every_bounds(
    request: Request, candidate: Candidate, stage_of: Sequence[int | None]
) -> Iterator[tuple[int, ...]]:
    model, stages = request.model, candidate.pp * candidate.vpp
    count, layers = len(model.segments), repeated(model)
    given = request.fix.stages
    allowed = windows(stages, count, stage_of, bounds_of(model, given) if given else None)
    if allowed is None:
        return
    low, high = allowed
    for inside in combinations(range(1, count), stages - 1):
        bounds = (0, *inside, count)
        if all(low[s] <= at <= high[s] for s, at in enumerate(bounds)) and (
            candidate.vpp == 1 or given or even_enough(layers.per_stage(bounds))
        ):
            yield bounds


def _fastest(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    bounds: tuple[int, ...],
    modes: Sequence[Recompute],
    known: dict[tuple[int, tuple[int, ...]], tuple[Recompute, ...] | None],
) -> list[list[Recompute]] | None:
    """The fastest modes that fit, rank by rank; what a rank holds hangs on nothing but itself."""
    layers, placement = repeated(request.model), placement_of(candidate)
    chosen: list[list[Recompute]] = [["none"] * (last - first) for first, last in pairwise(bounds)]
    for rank in range(candidate.pp):
        own = [v for v, at in enumerate(placement) if at == rank]
        places = [(v, i) for v in own for i in range(bounds[v], bounds[v + 1]) if i in layers]
        key = (rank, tuple(bounds[v + at] for v in own for at in (0, 1)))
        if key not in known:
            known[key] = _first_that_fits(
                request, candidate, inners, bounds, rank, places, modes, chosen
            )
        picks = known[key]
        if picks is None:
            return None
        for (v, i), mode in zip(places, picks, strict=True):
            chosen[v][i - bounds[v]] = mode
    return chosen


def _first_that_fits(
    request: Request,
    candidate: Candidate,
    inners: Sequence[Inner],
    bounds: tuple[int, ...],
    rank: int,
    places: Sequence[tuple[int, int]],
    modes: Sequence[Recompute],
    chosen: list[list[Recompute]],
) -> tuple[Recompute, ...] | None:
    inner = inners[rank]
    blocks = [request.model.segments[i].block for _, i in places]

    def seconds(picks: tuple[Recompute, ...]) -> float:
        costs = (inner.costs[b, mode].seconds for b, mode in zip(blocks, picks, strict=True))
        return sum(costs)

    own = [mode for mode in modes if mode in inner.modes]
    every = [p for p in product(own, repeat=len(places)) if len(set(p)) <= 2]
    for picks in sorted(every, key=seconds):
        for (v, i), mode in zip(places, picks, strict=True):
            chosen[v][i - bounds[v]] = mode
        memory = rank_bytes(request, candidate, inners, bounds, chosen)[rank]
        if fits(memory, inner):
            return picks
    return None
