"""Small planning problems, and all their plans one by one: what the search is held against.

A plan here is a configuration, a cut of the chain into stages, and a recompute mode for every
layer; of the modes only those fastest within the memory of their rank matter, as ranks wait for
nothing but time. Nothing of the search is used: no bounds, no dynamic program.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from typing import get_args

import numpy as np

import shardwright as sw
from shardwright.ir.from_dims import Experts, TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.ir.plan import Recompute
from shardwright.planner import Allow, Fix, Request, Search
from shardwright.planner.candidates import Candidate, placement_of
from shardwright.planner.footprint import rank_bytes
from shardwright.planner.inner import Inner
from shardwright.planner.request import repeated
from shardwright.planner.space import candidates
from shardwright.planner.step import price_step
from shardwright.planner.traffic import in_order
from shardwright.planner.virtual_stages import layers_before


@dataclass(frozen=True)
class Best:
    """The fastest plan there is, and how many configurations and cuts were priced."""

    seconds: float
    candidate: Candidate | None
    configurations: int
    cuts: int


def instance(seed: int) -> Request:
    """A random small problem: every dimension of the space is in some, memory binds in most."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([2, 4, 8]))
    experts = Experts(count=4, top_k=2, ffn=512) if rng.random() < 0.3 else None
    dims = TransformerDims(
        layers=int(rng.integers(2, 6)), hidden=heads * 128, heads=heads,
        kv_heads=int(rng.choice([heads, max(1, heads // 2)])),
        ffn=int(rng.choice([1024, 2048])), vocab=int(rng.choice([1024, 32000])),
        tied=bool(rng.random() < 0.2), experts=experts,
    )  # fmt: skip
    shapes = [(1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]
    nodes, each = shapes[rng.integers(len(shapes))]
    cluster = sw.Cluster.preset(str(rng.choice(["a100-40g", "h100-sxm"])), nodes, each)
    work = sw.Workload(int(rng.choice([4, 8, 12])), int(rng.choice([1024, 2048, 4096])))
    fixed = ["", "", "recompute=full", "recompute=none", "zero=1", "micro_batch=1"]
    model = transformer(dims, name=f"instance {seed}")
    share = float(rng.uniform(0.3, 1.5))  # of what the state takes, spread evenly
    room = int(model.elements * 18 / cluster.world_size * (1 + share)) + (1 << 28)
    fix = Fix.parse(str(rng.choice(fixed)))
    links = [None, 5e9, 50e9, 500e9]  # to host memory, which may be short as well
    allow = Allow(True, True, 10) if rng.random() < 0.25 else Allow()
    device = cluster.device.model_copy(update={
        "memory_bytes": cluster.device.reserve_bytes + room,
        "host_link_bytes_per_s": links[rng.integers(len(links))],
        "host_memory_bytes": int(rng.choice([1 << 28, 1 << 36])),
    })  # fmt: skip
    return Request.on(model, cluster.with_device(device), work, fix, allow=allow)


def best_of_all(request: Request) -> Best:
    """Prices every plan."""
    search = Search(request, anything=True)
    best, chosen, configurations, cuts = float("inf"), None, 0, 0
    for candidate in candidates(request):
        inners = search.solving.inners(candidate)
        if inners is None:
            continue
        configurations += 1
        slowdown = in_order(request.cluster, candidate)
        for bounds in every_cut(request.model, candidate):
            cuts += 1
            modes = fastest_modes(request, candidate, inners, bounds)
            if modes is not None:
                price = price_step(request, candidate, inners, bounds, modes, slowdown=slowdown)
                if price.seconds < best:
                    best, chosen = price.seconds, candidate
    return Best(best, chosen, configurations, cuts)


def every_cut(model: Model, candidate: Candidate) -> Iterator[tuple[int, ...]]:
    """All bounds of non-empty stages; with virtual stages those that are even enough."""
    stages, layers = candidate.pp * candidate.vpp, repeated(model)
    for inside in combinations(range(1, len(model.segments)), stages - 1):
        bounds = (0, *inside, len(model.segments))
        if candidate.vpp > 1:
            counts = layers.per_stage(bounds)
            each = layers.count // stages
            if bounds[1] <= layers.first and layers.first > 0 and each > 1:
                continue
            ends = all(each - 1 <= counts[v] <= each + 1 for v in (0, -1))
            if not ends or any(not each <= count <= each + 1 for count in counts[1:-1]):
                continue
            assert all(
                sum(counts[:first]) >= layers_before(layers.count, stages, first)
                for first in range(stages)
            )
        yield bounds


def fastest_modes(
    request: Request, candidate: Candidate, inners: tuple[Inner, ...], bounds: tuple[int, ...]
) -> list[list[Recompute]] | None:
    """For every stage the modes of its segments: the fastest that its rank's memory allows, of all
    there are; None where none do."""
    model, layers = request.model, repeated(request.model)
    placement = placement_of(candidate)
    fixed = request.fix.recompute
    allowed = [mode for mode in get_args(Recompute) if fixed in (None, mode)]
    chosen: list[list[Recompute]] = [["none"] * (last - first) for first, last in pairwise(bounds)]
    for rank, inner in enumerate(inners):
        own = [v for v, at in enumerate(placement) if at == rank]
        places = [(v, i - bounds[v]) for v in own for i in range(bounds[v], bounds[v + 1])
                  if i in layers]  # fmt: skip
        best: tuple[float, tuple[Recompute, ...]] | None = None
        own_modes = [mode for mode in allowed if mode in inner.modes]
        for modes in _assignments(model, bounds, places, own_modes):
            for (v, k), mode in zip(places, modes, strict=True):
                chosen[v][k] = mode
            seconds = sum(
                inner.costs[model.segments[bounds[v] + k].block, chosen[v][k]].seconds
                for v, k in places
            )
            if best is not None and seconds >= best[0]:
                continue
            memory = rank_bytes(request, candidate, inners, bounds, chosen)[rank]
            device = inner.cluster.device
            fits = memory.total <= device.memory_limit_bytes
            if fits and memory.host <= (device.host_memory_bytes or 0):
                best = seconds, modes
        if best is None:
            return None
        for (v, k), mode in zip(places, best[1], strict=True):
            chosen[v][k] = mode
    return chosen


def _assignments(
    model: Model,
    bounds: tuple[int, ...],
    places: list[tuple[int, int]],
    allowed: Sequence[Recompute],
) -> Iterator[tuple[Recompute, ...]]:
    """Modes for a rank's layers, no more than two different ones."""
    for modes in product(allowed, repeat=len(places)):
        if len(set(modes)) <= 2:
            yield modes
