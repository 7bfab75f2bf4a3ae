"""Links between devices: what is known closely lies over what is known roughly."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from cluster_cases import clusters, matrices
from hypothesis import assume, given
from hypothesis import strategies as st

from shardwright.costmodel import Cluster, Device
from shardwright.costmodel.cluster import Degraded, Level, Pair, PairMatrix
from shardwright.costmodel.levels import slowest_level
from shardwright.ir.errors import InvalidInput

MIXED = """\
name: mixed
device: a100-80g
devices_per_node: 8
levels:
  - {name: nvlink, span_devices: node, latency_s: 5.0e-6, bandwidth_bytes_per_s: 300.0e+9}
  - {name: nic, span_devices: island, latency_s: 1.0e-5, bandwidth_bytes_per_s: 25.0e+9}
  - {name: ethernet, span_devices: cluster, latency_s: 3.0e-5, bandwidth_bytes_per_s: 2.0e+9}
islands:
  - {name: old, nodes: 4, network: infiniband}
  - name: new
    nodes: 6
    device: h100-sxm
    network: roce
    levels:
      - {name: nvlink, bandwidth_bytes_per_s: 450.0e+9}
      - {name: nic, bandwidth_bytes_per_s: 50.0e+9, achieved_fraction: 0.9}
"""


def mixed(tmp_path: Path, more: str = "") -> Cluster:
    (tmp_path / "cluster.yaml").write_text(MIXED + more)
    return Cluster.load(tmp_path / "cluster.yaml")


@given(clusters(), st.data())
def test_the_slowest_link_is_the_slowest_of_all_pairs(
    cluster: Cluster, data: st.DataObject
) -> None:
    assume(cluster.world_size > 1)
    ranks = data.draw(
        st.sets(st.integers(0, cluster.world_size - 1), min_size=2, max_size=12), "ranks"
    )
    found = cluster.slowest_link(ranks)
    links = [cluster.pair(a, b) for a, b in permutations(ranks, 2)]
    assert found in links
    assert found.bandwidth_bytes_per_s == min(link.bandwidth_bytes_per_s for link in links)


@given(clusters())
def test_what_no_one_measured_is_the_same_both_ways(cluster: Cluster) -> None:
    plain = cluster.model_copy(update={"pairs": (), "matrix": None})
    for a, b in permutations(range(min(cluster.world_size, 8)), 2):
        link, back = plain.pair(a, b), plain.pair(b, a)
        assert link.bandwidth_bytes_per_s == back.bandwidth_bytes_per_s > 0
        assert link.latency_s == back.latency_s and not link.measured


@given(clusters())
def test_an_entry_is_what_its_link_has(cluster: Cluster) -> None:
    for entry in cluster.pairs:
        if entry.devices is not None:
            link = cluster.pair(*entry.devices)
            assert entry.latency_s in (None, link.latency_s)
            assert entry.bandwidth_bytes_per_s in (None, link.bandwidth_bytes_per_s)
            assert link.measured or entry.bandwidth_bytes_per_s is None


@given(clusters())
def test_worst_levels_are_no_faster_than_any_link_by_level(cluster: Cluster) -> None:
    """Links that only levels, islands and degraded nodes decide."""
    cluster = cluster.model_copy(
        update={"matrix": None, "pairs": tuple(p for p in cluster.pairs if p.islands)}
    )
    worst = {level.name: level for level in cluster.worst_levels}
    for a, b in permutations(range(cluster.world_size), 2):
        link = cluster.pair(a, b)
        reached = worst[link.level].reached_bytes_per_s(1)
        assert reached <= link.bandwidth_bytes_per_s * (1 + 1e-12)
        assert worst[link.level].latency_s >= link.latency_s


@given(
    st.lists(
        st.builds(
            Level,
            name=st.just("nic"),
            span_devices=st.just(8),
            latency_s=st.floats(0, 1),
            bandwidth_bytes_per_s=st.floats(1, 1e12),
            pair_bandwidth_bytes_per_s=st.none() | st.floats(1, 1e12),
            achieved_fraction=st.floats(0.1, 1),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 64),
)
def test_the_slowest_level_reaches_what_the_slowest_variant_does(
    variants: list[Level], peers: int
) -> None:
    expected = min(variant.reached_bytes_per_s(peers) for variant in variants)
    found = slowest_level(tuple(variants)).reached_bytes_per_s(peers)
    assert found == pytest.approx(expected)


def test_a_uniform_cluster_has_the_links_of_its_levels() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=4)
    assert cluster.worst_levels == cluster.levels
    near, far = cluster.pair(0, 7), cluster.pair(7, 8)
    assert (near.level, far.level) == ("nvlink", "infiniband")
    assert near.bandwidth_bytes_per_s == 450e9 * 0.81
    assert far.bandwidth_bytes_per_s == 50e9 * 0.85
    assert not far.measured and cluster.notes == ()
    assert cluster.slowest_link(range(32)).level == "infiniband"
    assert cluster.slowest_link(range(8)).level == "nvlink"


def test_islands_have_devices_and_links_of_their_own(tmp_path: Path) -> None:
    cluster = mixed(tmp_path)
    assert (cluster.nodes, cluster.world_size) == (10, 80)
    assert [level.span_devices for level in cluster.levels] == [8, 16, 80]
    assert cluster.device_kinds == (Device.preset("a100-80g"), Device.preset("h100-sxm"))
    assert cluster.device_of(31).name == "a100-80g"
    assert cluster.device_of(32).name == "h100-sxm"
    assert cluster.pair(0, 1).bandwidth_bytes_per_s == 300e9 * 0.8
    assert cluster.pair(32, 33).bandwidth_bytes_per_s == 450e9 * 0.8
    assert cluster.pair(0, 31).bandwidth_bytes_per_s == 25e9 * 0.8
    assert cluster.pair(32, 79).bandwidth_bytes_per_s == 50e9 * 0.9
    assert cluster.pair(31, 32).bandwidth_bytes_per_s == 2e9 * 0.8
    assert [level.reached_bytes_per_s(1) for level in cluster.worst_levels] == pytest.approx(
        [300e9 * 0.8, 25e9 * 0.8, 2e9 * 0.8]
    )
    assert cluster.notes == ()


def test_rdma_across_kinds_is_noted(tmp_path: Path) -> None:
    faster = MIXED.replace("2.0e+9", "25.0e+9")
    (tmp_path / "cluster.yaml").write_text(faster)
    (note,) = Cluster.load(tmp_path / "cluster.yaml").notes
    assert "old (infiniband) and new (roce) share no RDMA" in note


def test_what_is_known_closely_lies_over_what_is_known_roughly(tmp_path: Path) -> None:
    cluster = mixed(
        tmp_path,
        """\
degraded:
  - {nodes: [2, 5], bandwidth_fraction: 0.5}
  - {nodes: [7], compute_fraction: 0.8}
pairs:
  - {islands: [old, new], latency_s: 5.0e-5}
  - {nodes: [0, 1], bandwidth_bytes_per_s: 10.0e+9}
  - {nodes: [1, 0], bandwidth_bytes_per_s: 12.0e+9}
  - {nodes: [0, 2], latency_s: 2.0e-5}
  - {devices: [3, 9], bandwidth_fraction: 0.5}
matrix:
  noise_floor_fraction: 0.05
  rows: ["- 20100 20900 19900", "20000 - 20000 20000", "20000 20000 - 12000", "19000 20000 20000 -"]
""",
    )
    assert cluster.pair(0, 8).bandwidth_bytes_per_s == 10e9
    assert cluster.pair(8, 0).bandwidth_bytes_per_s == 12e9
    assert cluster.pair(3, 9).bandwidth_bytes_per_s == 5e9
    assert not cluster.pair(3, 9).measured and cluster.pair(4, 9).measured
    # The matrix, with what is within its noise made equal; the degraded node was measured so.
    assert cluster.pair(0, 16).bandwidth_bytes_per_s == 20e9
    assert cluster.pair(0, 16).latency_s == 2e-5
    assert cluster.pair(16, 24).bandwidth_bytes_per_s == 12e9
    assert cluster.pair(24, 16).bandwidth_bytes_per_s == 20e9
    # Where nothing was measured, nodes 5 and 2 have half of their links.
    assert cluster.pair(40, 48).bandwidth_bytes_per_s == 50e9 * 0.9 * 0.5
    assert cluster.pair(0, 40).bandwidth_bytes_per_s == 2e9 * 0.8 * 0.5
    assert cluster.pair(0, 40).latency_s == 5e-5
    assert cluster.pair(40, 41).bandwidth_bytes_per_s == 450e9 * 0.8
    assert cluster.compute_fraction(56) == 0.8 and cluster.compute_fraction(0) == 1
    notes = "\n".join(cluster.notes)
    for part in (
        "asymmetric by up to 40.0% (nodes 2 and 3)",
        "within 5.0%",
        "nodes 2 to 3 at 60%",
        "covers nodes 0 to 3",
        "asymmetric nodes 0 and 1 by 16.7%",
        "links of node 2 at 50%, 5 at 50%",
        "arithmetic of node 7 at 80%",
    ):
        assert part in notes


def test_a_copy_does_not_keep_what_was_derived_from_the_original() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=2)
    assert cluster.pair(0, 8).bandwidth_bytes_per_s == 42.5e9
    slower = cluster.model_copy(
        update={"degraded": (Degraded(nodes=(1,), bandwidth_fraction=0.5),)}
    )
    assert slower.pair(0, 8).bandwidth_bytes_per_s == 21.25e9
    assert hash(slower) != hash(cluster) and slower != cluster
    assert cluster == Cluster.preset("h100-sxm", nodes=2)
    assert hash(cluster) == hash(Cluster.preset("h100-sxm", nodes=2))


def test_measurements_are_merged() -> None:
    cluster = Cluster.preset("h100-sxm", nodes=4)
    first = Pair(nodes=(0, 1), bandwidth_bytes_per_s=1e9)
    cluster = cluster.with_pairs([first, Pair(nodes=(2, 3), bandwidth_bytes_per_s=2e9)])
    cluster = cluster.with_pairs([Pair(nodes=(0, 1), bandwidth_bytes_per_s=3e9)])
    assert [pair.bandwidth_bytes_per_s for pair in cluster.pairs] == [3e9, 2e9]
    with pytest.raises(InvalidInput, match=r"pairs\[2\].nodes is \[0, 4\], expected nodes 0 to 3"):
        cluster.with_pairs([Pair(nodes=(0, 4), bandwidth_bytes_per_s=3e9)])


@given(clusters(), st.integers(1, 8))
def test_any_cluster_can_be_resized(cluster: Cluster, nodes: int) -> None:
    resized = cluster.resized(nodes)
    assert (resized.nodes, resized.world_size) == (nodes, nodes * cluster.devices_per_node)
    assert resized.device == cluster.device
    assert resized.levels[-1].name == cluster.levels[-1].name
    for island, before in zip(resized.islands[:-1], cluster.islands, strict=False):
        assert island == before
    assert resized.resized(nodes) == resized


@given(st.lists(st.floats(1e9, 2e10), min_size=25, max_size=25), st.booleans())
def test_a_matrix_keeps_every_link_to_its_digits(values: list[float], symmetric: bool) -> None:
    square = np.array(values).reshape(5, 5)
    square = np.minimum(square, square.T) if symmetric else square
    matrix = PairMatrix.of(square)
    kept = matrix.bandwidth_bytes_per_s
    off = ~np.eye(5, dtype=bool)
    assert np.isinf(np.diag(kept)).all()
    assert np.abs(kept - square)[off].max() <= 0.5001 * matrix.unit_bytes_per_s
    assert 1000 <= square[off].max() / matrix.unit_bytes_per_s < 10_000
    assert matrix.is_lower or not symmetric


@given(matrices(6))
def test_a_matrix_is_written_as_it_is(matrix: PairMatrix) -> None:
    assert PairMatrix.model_validate(matrix.model_dump()) == matrix


@pytest.mark.parametrize("ranks", [[], [3], [3, 3], [0, 16], [-1, 2]])
def test_bad_ranks(ranks: list[int]) -> None:
    cluster = Cluster.preset("h100-sxm", nodes=2)
    with pytest.raises(InvalidInput, match="expected"):
        cluster.slowest_link(ranks)
    if len(ranks) == 2:
        with pytest.raises(InvalidInput, match="expected"):
            cluster.pair(*ranks)
