"""Random clusters: islands, nesting levels, entries of pairs, degraded nodes, matrices, curves."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
from hypothesis import strategies as st

from shardwright.costmodel import Cluster, Device
from shardwright.costmodel.cluster import Degraded, Island, Level, Pair, PairMatrix
from shardwright.costmodel.curves import Curve
from shardwright.costmodel.levels import LevelChange

DEFAULT = Device.preset("a100-80g")
devices = st.sampled_from([None, Device.preset("v100"), Device.preset("h200")])
rates = st.floats(1e6, 1e12)
latencies = st.floats(0, 1e-3)
fractions = st.floats(0.05, 0.95)


@st.composite
def levels(draw: st.DrawFn, name: str, span: int, whole_island: bool = False) -> Level:
    return Level(
        name=name,
        span_devices=span,
        latency_s=draw(latencies),
        bandwidth_bytes_per_s=draw(rates),
        pair_bandwidth_bytes_per_s=draw(st.none() | rates),
        achieved_fraction=draw(fractions),
        whole_island=whole_island,
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Small enough to look at every pair of devices."""
    per_node = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    nodes = sum(sizes) or draw(st.integers(1, 6))
    world = nodes * per_node
    spans = []
    if per_node > 1 and draw(st.booleans()):
        spans.append(("pairs", 2, False))
    if draw(st.booleans()):
        spans.append(("node", per_node, False))
    if sizes and draw(st.booleans()):
        spans.append(("nic", gcd(*sizes) * per_node, True))
    spans.append(("cluster", world, False))
    names = [name for name, _, _ in spans]
    islands = tuple(
        Island(
            name=f"island {i}",
            nodes=size,
            device=draw(devices),
            network=draw(st.sampled_from([None, "infiniband", "roce", "ethernet"])),
            levels=tuple(
                LevelChange(
                    name=name,
                    latency_s=draw(st.none() | latencies),
                    bandwidth_bytes_per_s=draw(st.none() | rates),
                    achieved_fraction=draw(st.none() | fractions),
                )
                for name in draw(st.sets(st.sampled_from(names)))
            ),
        )
        for i, size in enumerate(sizes)
    )
    found = tuple(draw(levels(*span)) for span in spans)
    return Cluster(
        name=draw(st.text(min_size=1, max_size=5)),
        device=DEFAULT,
        nodes=nodes,
        devices_per_node=per_node,
        levels=found,
        islands=islands,
        pairs=draw(entries(world, nodes, [island.name for island in islands])),
        degraded=draw(slow_nodes(nodes)),
        matrix=draw(st.none() | matrices(nodes)) if nodes > 1 else None,
        curves=draw(curves(found)),
    )


@st.composite
def entries(draw: st.DrawFn, world: int, nodes: int, islands: list[str]) -> tuple[Pair, ...]:
    found = []
    for kind, ends in (("devices", range(world)), ("nodes", range(nodes)), ("islands", islands)):
        possible = [(a, b) for a in ends for b in ends if a != b]
        for pair in draw(st.sets(st.sampled_from(possible), max_size=3)) if possible else ():
            told: dict[str, Any] = draw(
                st.fixed_dictionaries({"bandwidth_bytes_per_s": rates})
                | st.fixed_dictionaries({"bandwidth_fraction": fractions})
                | st.fixed_dictionaries({"latency_s": latencies})
            )
            found.append(Pair(**{kind: pair}, **told))
    return tuple(found)


@st.composite
def slow_nodes(draw: st.DrawFn, nodes: int) -> tuple[Degraded, ...]:
    slow = sorted(draw(st.sets(st.integers(0, nodes - 1), max_size=2)))
    return tuple(Degraded(nodes=(n,), bandwidth_fraction=draw(fractions)) for n in slow)


@st.composite
def matrices(draw: st.DrawFn, nodes: int) -> PairMatrix:
    size = draw(st.integers(2, nodes))
    values = draw(st.lists(rates, min_size=size**2, max_size=size**2))
    square = np.array(values).reshape(size, size)
    if draw(st.booleans()):
        square = np.minimum(square, square.T)
    return PairMatrix.of(
        square,
        noise_floor_fraction=draw(st.floats(0, 0.5)),
        first_node=draw(st.integers(0, nodes - size)),
        source=draw(st.sampled_from(["", "two captures"])),
    )


@st.composite
def curves(draw: st.DrawFn, cluster_levels: tuple[Level, ...]) -> tuple[Curve, ...]:
    room = cluster_levels[0].span_devices
    if room < 2 or draw(st.booleans()):
        return ()
    sizes = sorted(draw(st.sets(st.floats(1, 1e9), min_size=1, max_size=4)))
    return tuple(
        Curve(
            collective=kind,
            shape=(draw(st.integers(2, room)),),
            bytes=tuple(sizes),
            seconds=tuple(draw(st.floats(1e-6, 1)) for _ in sizes),
        )
        for kind in draw(st.sets(st.sampled_from(["all_reduce", "all_gather", "send"])))
    )
