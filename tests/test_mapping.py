"""Mapping: equal to brute force, never below its bound, and what a plan makes of measured links."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from cluster_cases import clusters
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel.cluster import Cluster, Degraded, Pair, PairMatrix
from shardwright.ir import InvalidInput
from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.planner import mapping as mapping_module
from shardwright.planner.candidates import Candidate
from shardwright.planner.leave_out import slow_nodes
from shardwright.planner.mapping import Array, Flow, flow_seconds, map_places
from shardwright.planner.traffic import StageTraffic, has_choice, mapped, slowness_of

WORK = sw.Workload(global_batch=64, seq_len=1024)


@pytest.fixture(autouse=True, scope="module")
def _less_effort() -> Iterator[None]:
    """Small cases are proved by the exact program; one start of the exchanges is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping_module, "_RESTARTS", 1)
        patch.setattr(mapping_module, "_STEPS", 300)
        yield


def grid(pp: int, dp: int, rng: np.random.Generator) -> list[Flow]:
    """Rings of `dp` places in each of `pp` stages, and what stages hand on."""
    rings = [(s * dp + d, s * dp + (d + 1) % dp) for s in range(pp) for d in range(dp)]
    flows = [Flow("data", np.array(rings), rng.uniform(0.5, 2.0, len(rings)))]
    for s in range(pp - 1):
        ends = np.array([(s * dp + d, (s + 1) * dp + d) for d in range(dp)])
        flows.append(Flow(f"boundary {s}", ends, rng.uniform(0.1, 1.0, dp)))
    return flows


def links(nodes: int, rng: np.random.Generator, slow: float = 0.3) -> Array:
    """Slownesses around 1, some links much slower."""
    found = rng.uniform(0.98, 1.02, (nodes, nodes))
    found[rng.random((nodes, nodes)) < slow] *= rng.uniform(1.5, 5.0)
    np.fill_diagonal(found, 0.0)
    return found


def seconds(flows: list[Flow], node_of: tuple[int, ...], slowness: Array) -> float:
    """The sum over flows of their worst edges, one by one."""
    return sum(float(flow_seconds(flow, node_of, slowness).max()) for flow in flows)


@pytest.mark.parametrize(
    ("nodes", "pp", "dp"), [(3, 3, 1), (4, 2, 2), (5, 2, 2), (6, 3, 2), (6, 1, 5), (7, 2, 3)]
)
@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_mappings_is_found(nodes: int, pp: int, dp: int, seed: int) -> None:
    rng = np.random.default_rng([seed, nodes])
    flows, slowness = grid(pp, dp, rng), links(nodes, rng)
    found = map_places(flows, pp * dp, slowness)
    every = [seconds(flows, p, slowness) for p in permutations(range(nodes), pp * dp)]
    assert found.seconds == pytest.approx(min(every), rel=1e-9)
    assert found.seconds == pytest.approx(seconds(flows, found.node_of, slowness), rel=1e-12)
    assert found.bound_seconds == pytest.approx(min(every), rel=1e-6)
    assert len(set(found.node_of)) == pp * dp


@given(st.integers(2, 24), st.integers(0, 10**6), st.data())
@settings(max_examples=25)
def test_no_mapping_is_below_the_bound(nodes: int, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    pp = data.draw(st.integers(1, nodes))
    dp = nodes // pp
    flows, slowness = grid(pp, dp, rng), links(nodes, rng)
    with pytest.MonkeyPatch.context() as patch:  # the bound does not depend on effort
        patch.setattr(mapping_module, "_EXACT_EFFORT", 0.05)
        found = map_places(flows, pp * dp, slowness)
        assert found == map_places(flows, pp * dp, slowness)
    assert found.bound_seconds <= found.seconds <= found.in_order_seconds * (1 + 1e-12)
    for _ in range(20):
        other = tuple(rng.permutation(nodes)[: pp * dp].tolist())
        assert seconds(flows, other, slowness) >= found.bound_seconds * (1 - 1e-9)


def test_large_clusters_avoid_slow_links() -> None:
    rng = np.random.default_rng(1)
    flows, slowness = grid(8, 16, rng), links(128, rng, slow=0.1)
    found = map_places(flows, 128, slowness)
    assert found.seconds < 0.6 * found.in_order_seconds
    assert found.seconds < 1.2 * found.bound_seconds


def test_bad_input_is_said() -> None:
    with pytest.raises(InvalidInput, match="5 places: expected at most the cluster's 4 nodes"):
        map_places([], 5, np.zeros((4, 4)))
    flow = Flow("data", np.array([(0, 4)]), np.ones(1))
    with pytest.raises(InvalidInput, match="flow data: expected ends from 0 to 3"):
        map_places([flow], 4, np.zeros((4, 4)))


# --- links ---------------------------------------------------------------------------------------


@given(clusters())
def test_links_between_nodes_are_those_of_their_devices(cluster: Cluster) -> None:
    cluster = cluster.model_copy(update={"matrix": None})
    latency_s, bandwidth = cluster.node_links()
    special = {frozenset(pair.devices) for pair in cluster.pairs if pair.devices}
    per_node = cluster.devices_per_node
    for i in range(cluster.nodes):
        assert (latency_s[i, i], bandwidth[i, i]) == (0, np.inf)
        for j in range(cluster.nodes):
            ends = i * per_node, j * per_node
            if i != j and frozenset(ends) not in special:
                link = cluster.pair(*ends)
                assert latency_s[i, j] == link.latency_s
                assert bandwidth[i, j] == pytest.approx(link.bandwidth_bytes_per_s, rel=1e-12)


def test_a_matrix_counts_relative_to_its_fastest_links() -> None:
    measured = np.full((4, 4), 70e9)
    measured[0, 1] = measured[1, 0] = 35e9
    measured[2, 3] = 69e9  # within the noise
    plain = Cluster.preset("a100-80g", nodes=4)
    cluster = plain.with_pairs(PairMatrix.of(measured, noise_floor_fraction=0.05))
    expected = np.where(np.eye(4) == 1, 0.0, 1.0)
    expected[0, 1] = expected[1, 0] = 2.0
    assert slowness_of(cluster) == pytest.approx(expected)
    assert has_choice(cluster) and not has_choice(plain)


# --- plans ---------------------------------------------------------------------------------------


def test_groups_are_laid_where_their_links_are() -> None:
    cluster = Cluster.preset("a100-80g", nodes=4).with_pairs(
        [Pair(nodes=(0, 1), bandwidth_fraction=0.25), Pair(nodes=(2, 3), bandwidth_fraction=0.5)]
    )
    candidate = Candidate(pp=2, dp=2, tp=8, zero=1, micro_batch=1, microbatches=4)
    heavy_rings = [StageTraffic(1.0, 0.5, 0.001), StageTraffic(1.0, 0.5, 0.0)]
    found, slowdown = mapped(cluster, candidate, heavy_rings)
    assert {frozenset(found.node_of[:2]), frozenset(found.node_of[2:])} not in (
        {frozenset((0, 1)), frozenset((2, 3))},
    )
    assert slowdown.data == (1.0, 1.0) and slowdown.tensor == (1.0, 1.0)
    heavy_pipe = [StageTraffic(0.001, 0.5, 1.0), StageTraffic(0.001, 0.5, 0.0)]
    found, slowdown = mapped(cluster, candidate, heavy_pipe)
    assert slowdown.boundary == (1.0,)
    assert found.in_order_seconds == pytest.approx(1.0 + 0.001 * 4)


def test_tensor_parallel_groups_across_nodes_are_seen() -> None:
    cluster = Cluster.preset("a100-80g", nodes=4, devices_per_node=4).with_pairs(
        [Pair(nodes=(0, 1), bandwidth_fraction=0.25)]
    )
    candidate = Candidate(pp=1, dp=2, tp=8, zero=0, micro_batch=1, microbatches=4)
    found, slowdown = mapped(cluster, candidate, [StageTraffic(0.01, 1.0, 0.0)])
    assert 0 in found.node_of[:2] or 0 in found.node_of[2:]
    assert slowdown.tensor == (1.0,)
    assert found.in_order_seconds == pytest.approx(4.0 + 0.01)


def test_a_plan_says_how_to_place_its_nodes(tmp_path: Path) -> None:
    model = transformer(TransformerDims(layers=8, hidden=2048, heads=16, ffn=8192, vocab=32000))
    plain = Cluster.preset("a100-80g", nodes=4)
    slow = plain.with_pairs(
        [Pair(nodes=(0, 1), bandwidth_fraction=0.1), Pair(nodes=(2, 3), bandwidth_fraction=0.1)]
    )
    fix = "pp=2,tp=8,dp=2,zero=0,micro_batch=2,recompute=none"
    best, placed = (sw.plan(model, cluster, WORK, fix=fix) for cluster in (plain, slow))
    assert best.mapping is None
    assert placed.mapping is not None
    assert placed.mapping.seconds < placed.mapping.in_order_seconds
    # two good links are enough for two rings, so nothing is lost
    assert placed.predicted.step_seconds == pytest.approx(best.predicted.step_seconds, rel=1e-3)
    assert f"nodes in the order {' '.join(map(str, placed.mapping.node_of))}" in str(placed)
    placed.save(tmp_path / "plan.json")
    assert sw.Plan.load(tmp_path / "plan.json").mapping == placed.mapping
    everywhere = plain.with_pairs(
        [Pair(nodes=(i, j), bandwidth_fraction=0.1) for i in range(4) for j in range(i)]
    )
    worse = sw.plan(model, everywhere, WORK, fix=fix)
    assert worse.predicted.step_seconds > 1.02 * best.predicted.step_seconds


# --- slow nodes ----------------------------------------------------------------------------------


def test_a_slow_node_is_better_left_out() -> None:
    model = transformer(TransformerDims(layers=8, hidden=2048, heads=16, ffn=8192, vocab=32000))
    plain = Cluster.preset("a100-80g", nodes=3)
    work = sw.Workload(global_batch=96, seq_len=1024)

    def plan(fraction: float) -> sw.Plan:
        slow = Degraded(nodes=(1,), compute_fraction=fraction)
        return sw.plan(model, plain.model_copy(update={"degraded": (slow,)}), work)

    assert slow_nodes(plain) == () and sw.plan(model, plain, work).advice == ()
    assert plan(0.95).advice == ()  # two nodes are not faster than three
    slow = plan(0.3)
    two = sw.plan(model, plain.resized(2), work).predicted.step_seconds
    (line,) = slow.advice
    gain = 1 - two / slow.predicted.step_seconds
    assert line.startswith(f"without node 1 a step takes {two:.4g} s, {gain:.1%} less: pp=")
    assert line in str(slow)


def test_slow_nodes_are_those_of_slow_links() -> None:
    measured = np.full((5, 5), 8e9)
    measured[3, :] = measured[:, 3] = 4e9
    measured[0, 1] = measured[1, 0] = 1e9  # a bad link makes no slow node
    cluster = Cluster.preset("a100-80g", nodes=5).with_pairs(PairMatrix.of(measured))
    assert slow_nodes(cluster) == (3,)
    degraded = Degraded(nodes=(4,), bandwidth_fraction=0.1)
    assert slow_nodes(cluster.model_copy(update={"degraded": (degraded,)})) == (4, 3)
