"""What other tools print, read into curves, levels and matrices; noise is told from links."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shardwright.costmodel import Cluster
from shardwright.costmodel.importers import (
    mpigraph,
    nccl_tests,
    node_levels,
    pairwise,
    standing_out,
    symmetrised,
    topology,
)
from shardwright.costmodel.importers.nccl_tests import group_shape
from shardwright.costmodel.importers.ring_order import order_effect
from shardwright.ir.errors import InvalidInput

FIXTURES = Path(__file__).parent / "fixtures" / "importers"
TWO_NODES = Cluster.preset("h100-sxm", nodes=2)
Matrix = NDArray[np.float64]


def read(name: str) -> str:
    return (FIXTURES / name).read_text()


def links(rng: np.random.Generator, size: int, spread: float = 0.005) -> Matrix:
    """True bandwidths, the same both ways."""
    half = np.triu(1 + spread * rng.standard_normal((size, size)), 1)
    return 2e10 * (half + half.T + np.eye(size))


def measured(
    rng: np.random.Generator, true: Matrix, noise: float, ring: Matrix | None = None
) -> Matrix:
    """A capture; along a ring, the first step of the measurement is slow and the rest drifts."""
    size = len(true)
    seen = true * (1 + noise * rng.standard_normal((size, size)))
    if ring is None:
        return seen
    place = np.argsort(ring)
    distance = (place[None, :] - place[:, None]) % size
    return seen * np.where(distance == 1, 0.89, 0.98 + 0.04 * distance / size)


# What is of the links, what is of chance


@pytest.mark.parametrize("size", [8, 16, 48])
@pytest.mark.parametrize("captures", [1, 2, 5])
def test_noise_alone_makes_no_slow_link(size: int, captures: int) -> None:
    """At most a few of many clusters: the floor is meant for 5 %."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        true = links(rng, size, spread=0.0)
        names = [f"n{i}" for i in range(size)]
        found = symmetrised([measured(rng, true, 0.03) for _ in range(captures)], names)
        cluster = Cluster.preset("h100-sxm", nodes=size).with_pairs(found.matrix())
        assert cluster.matrix is not None
        alarms += bool(standing_out(cluster, cluster.matrix))
    assert alarms <= 6


@pytest.mark.parametrize("captures", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_measuring_makes_no_slow_link_and_hides_none(seed: int, captures: int) -> None:
    rng = np.random.default_rng(seed)
    size = 16
    ring = rng.permutation(size)
    true = links(rng, size)
    bad = tuple(sorted(rng.choice(size, 2, replace=False).tolist()))
    broken = true.copy()
    broken[bad] = broken[bad[::-1]] = 0.6 * true[bad]
    names = [f"n{i}" for i in range(size)]
    for links_now, expected in ((true, ()), (broken, (bad,))):
        seen = [measured(rng, links_now, 0.005, ring) for _ in range(captures)]
        found = symmetrised(seen, names)
        assert found.order_fraction > (0.2 if expected else 0.8)
        assert any("order in which they were measured" in note for note in found.notes)
        cluster = Cluster.preset("h100-sxm", nodes=size).with_pairs(found.matrix())
        assert cluster.matrix is not None
        assert tuple(p.nodes for p in standing_out(cluster, cluster.matrix)) == expected
        assert any("slower than the median" in note for note in cluster.notes) == bool(expected)
        slowest = cluster.slowest_link(range(cluster.world_size))
        median = np.median(found.bandwidth_bytes_per_s[np.triu_indices(size, 1)])
        if expected:
            assert (slowest.source // 8, slowest.target // 8) in (bad, bad[::-1])
            assert slowest.bandwidth_bytes_per_s == pytest.approx(0.6 * median, rel=0.1)
        else:
            assert slowest.bandwidth_bytes_per_s == pytest.approx(median, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_racks_are_not_taken_for_an_order_of_measuring(seed: int) -> None:
    """Neighbours in the list are faster, both ways: that is of the links."""
    rng = np.random.default_rng(seed)
    rack = np.arange(16) // 4
    true = links(rng, 16) * np.where(rack[:, None] == rack[None, :], 1.5, 1.0)
    effect, share = order_effect(measured(rng, true, 0.01))
    assert share == 0 and not effect.any()


@given(
    st.integers(2, 7).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(1e6, 1e12), min_size=n * n, max_size=n * n), min_size=1, max_size=3
        )
    ),
    st.randoms(use_true_random=False),
)
def test_the_mean_of_directions_and_captures_is_kept(
    values: list[list[float]], random: object
) -> None:
    size = round(len(values[0]) ** 0.5)
    captures = [np.array(one).reshape(size, size) for one in values]
    names = [f"n{i}" for i in range(size)]
    found = symmetrised(captures, names)
    kept = found.bandwidth_bytes_per_s
    assert (kept == kept.T).all()
    for i, j in combinations(range(size), 2):
        both = [capture[i, j] for capture in captures] + [capture[j, i] for capture in captures]
        assert kept[i, j] == pytest.approx(np.mean(both))
    assert 0 <= found.noise_floor_fraction < 1
    turned = symmetrised([capture.T for capture in captures], names)
    assert turned.bandwidth_bytes_per_s == pytest.approx(kept)


def test_equal_directions_tell_nothing_of_the_noise() -> None:
    square = links(np.random.default_rng(0), 4)
    found = symmetrised([square], "abcd")
    assert found.noise_floor_fraction == 0.05
    assert "the noise is not known" in found.notes[0]


def test_links_are_compared_with_their_kind() -> None:
    """A rack's fast links are no outliers, and a slow one among them is not hidden by the rest."""
    rng = np.random.default_rng(1)
    rack = np.arange(16) // 4
    true = links(rng, 16, spread=0.0) * np.where(rack[:, None] == rack[None, :], 2.0, 1.0)
    true[5, 6] = true[6, 5] = true[0, 8]
    found = symmetrised([measured(rng, true, 0.01)], [str(i) for i in range(16)])
    base = Cluster.preset("h100-sxm", nodes=16)
    rack_level = base.levels[-1].model_copy(update={"name": "rack", "span_devices": 32})
    cluster = base.model_copy(update={"levels": (base.levels[0], rack_level, base.levels[1])})
    (odd,) = standing_out(cluster, found.matrix())
    assert odd.nodes == (5, 6)


# Matrices


def table(matrix: Matrix, names: list[str], separator: str = ",") -> str:
    rows = [separator.join(["from/to", *names])]
    rows += [
        separator.join([name, *(f"{value:.1f}" for value in row)])
        for name, row in zip(names, matrix / 1e6, strict=True)
    ]
    return "\n".join(rows) + "\n"


def test_pairwise_matrices_with_and_without_names() -> None:
    rng = np.random.default_rng(2)
    names = [f"node{i:02d}" for i in range(5)]
    square = measured(rng, links(rng, 5), 0.02)
    with_names = pairwise(table(square, names))
    assert with_names.nodes == tuple(names)
    np.fill_diagonal(square, np.nan)
    bare = "\n".join(" ".join(f"{v / 1e6:.1f}" for v in row) for row in square)
    assert pairwise(bare).bandwidth_bytes_per_s == pytest.approx(with_names.bandwidth_bytes_per_s)
    tabs = pairwise(table(square, names, "\t"), flows=8, unit_bytes_per_s=1e9)
    assert tabs.bandwidth_bytes_per_s == pytest.approx(with_names.bandwidth_bytes_per_s * 125)


def test_nodes_of_captures_are_matched_by_name() -> None:
    rng = np.random.default_rng(3)
    names = [f"node{i:02d}" for i in range(4)]
    square = measured(rng, links(rng, 4), 0.1)
    turned = square[np.ix_([3, 1, 0, 2], [3, 1, 0, 2])]
    both = pairwise(table(square, names), table(turned, [names[i] for i in (3, 1, 0, 2)]))
    once = pairwise(table(square, names))
    assert both.bandwidth_bytes_per_s == pytest.approx(once.bandwidth_bytes_per_s)
    back = pairwise(table(square, names), nodes=names[::-1])
    assert back.bandwidth_bytes_per_s[0, 1] == once.bandwidth_bytes_per_s[3, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, expected a square matrix"),
        ("x,a,b\na,1,2\n", "1 rows of 2 nodes, expected a square matrix"),
        ("x,a,b\na,1,2\nc,2,1\n", "line 3: row of 'c', expected 'b' as in the header"),
        ("x,a,a\na,1,2\na,2,1\n", "line 1: node 'a' is named twice"),
        ("x,a,b\na,1,2,3\nb,2,1\n", "line 2: 4 values, expected 2"),
        ("x,a,b\na,1,-5\nb,2,1\n", "line 2: '-5' from node 0 to node 1, expected a number above 0"),
        ("x,a,b\na,1,nan\nb,2,1\n", "line 2: no bandwidth from node 0 to node 1"),
        ("x,a,b\na,1,2\nb,,1\n", "line 3: no bandwidth from node 1 to node 0"),
        ("x,a,b\na,1,2\nb,fast,1\n", "line 3: 'fast' from node 1 to node 0"),
        ("hello world\nthis is prose\n", "expected"),
    ],
)
def test_what_is_no_matrix(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        pairwise(text)
    assert "\n" not in str(caught.value)


def test_captures_of_other_nodes() -> None:
    with pytest.raises(InvalidInput, match="no node 'b', it has a, c"):
        pairwise("x,a,b\na,1,2\nb,2,1\n", "x,a,c\na,1,2\nc,2,1\n")
    with pytest.raises(InvalidInput, match="node 'b' is not among the 1 expected"):
        pairwise("x,a,b\na,1,2\nb,2,1\n", nodes=["a"])
    with pytest.raises(InvalidInput, match="at least one matrix"):
        pairwise()


def test_mpigraph() -> None:
    found = mpigraph(read("mpigraph.txt"))
    assert found.nodes == tuple(f"rack{i}-n{j}" for i in range(2) for j in range(3))
    # Both tables tell of the same transfers: 0 → 2 sent 11040.168, received 11062.248 MiB/s; back
    # 10955.700 and 10977.612.
    mean = (11040.168 + 11062.248 + 10955.7 + 10977.612) / 4 * 1024**2
    assert found.bandwidth_bytes_per_s[0, 2] == pytest.approx(mean)
    cluster = Cluster.preset("h100-sxm", nodes=6).with_pairs(found.matrix())
    assert cluster.matrix is not None
    assert [pair.nodes for pair in standing_out(cluster, cluster.matrix)] == [(1, 4)]
    assert any("nodes 1 to 4 at 64%" in note for note in cluster.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "found no table, expected the Send and Recv tables"),
        (
            lambda text: text.partition("Recv max")[0],
            "found Send table, expected the Send and Recv",
        ),
        (lambda text: text.replace("rack0-n1:", "rack0-n0:"), "line 17: several tasks on rack0-n0"),
        (
            lambda text: text.replace("rack1-n0:3 to", "rack1-n9:3 to"),
            "line 21: expected the row of rack1-n0 with 6 values",
        ),
        (
            lambda text: text.replace("7023.892", "nan"),
            "line 19: 'nan' between rack0-n1 and rack1-n1, expected a number above 0",
        ),
    ],
)
def test_what_is_no_mpigraph(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        mpigraph(change(read("mpigraph.txt")))
    assert "\n" not in str(caught.value)


# Collectives


def test_nccl_tests_of_several_collectives() -> None:
    found = nccl_tests(read("nccl_two_nodes.txt"), TWO_NODES)
    reduce, exchange = found.curves
    assert (reduce.collective, reduce.shape) == ("all_reduce", (8, 2))
    assert (exchange.collective, exchange.shape) == ("all_to_all", (8, 2))
    assert reduce.bytes == tuple(float(4**k) for k in range(5, 17))
    assert reduce.seconds[0] == pytest.approx((38.01 + 37.24) / 2 * 1e-6)
    # An all-to-all's size is one rank's buffer; ours is the whole of the group.
    assert exchange.bytes[0] == 16 * 65536
    assert found.noise_fraction == pytest.approx(0.02, abs=0.002)
    cluster = TWO_NODES.with_curves(found.curves)
    assert cluster.curves == found.curves
    assert cluster.with_curves(found.curves[:1]) == cluster


def test_older_versions_leave_columns_blank_and_the_name_out() -> None:
    (gather,) = nccl_tests(read("nccl_old_all_gather.txt"), TWO_NODES).curves
    assert (gather.collective, gather.shape, gather.bytes[0]) == ("all_gather", (8,), 16384)
    assert gather.seconds[0] == pytest.approx((25.06 + 24.56) / 2 * 1e-6)
    (reduce,) = nccl_tests(read("nccl_old.txt"), TWO_NODES).curves  # by its bus bandwidth
    assert (reduce.collective, reduce.shape) == ("all_reduce", (8,))
    nameless = read("nccl_old_all_gather.txt").partition("\n")[2]
    with pytest.raises(InvalidInput, match="does not name its collective"):
        nccl_tests(nameless, TWO_NODES)
    (given,) = nccl_tests(nameless, TWO_NODES, collective="reduce_scatter").curves
    assert given.collective == "reduce_scatter"


@pytest.mark.parametrize(
    ("cluster", "hosts", "per_host", "shape"),
    [
        ("h100-sxm:4", 1, 8, (8,)),
        ("h100-sxm:4", 1, 4, (4,)),
        ("h100-sxm:4", 4, 8, (8, 4)),
        ("h100-sxm:4", 4, 1, (1, 4)),
        ("h100-sxm:4", 2, 4, (4, 2)),
        ("mi250x:2", 2, 8, (2, 4, 2)),
        ("mi250x:2", 1, 4, (2, 2)),
        ("gb200-nvl72:32x4", 16, 4, (64,)),
        ("gb200-nvl72:32x4", 32, 4, (64, 2)),
    ],
)
def test_group_shapes(cluster: str, hosts: int, per_host: int, shape: tuple[int, ...]) -> None:
    lay = Cluster.parse(cluster)
    found = group_shape(lay, [f"h{i}" for i in range(hosts) for _ in range(per_host)], "test")
    expected = tuple(units for units in shape if units > 1)
    assert tuple(units for units in found if units > 1) == expected
    assert np.prod(found) == hosts * per_host and len(found) <= len(lay.levels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "nothing here", "holds no results, expected the table that nccl-tests"),
        (
            lambda text: text.replace("all_reduce_perf", "hypercube_perf"),
            "line 8: hypercube_perf, exp",
        ),
        (
            lambda text: text.replace("gpu001 device  7", "gpu000 device  8"),
            "9 ranks on gpu000 and 7",
        ),
        (
            lambda text: text.replace("Rank  1 Group", "Rank  0 Group"),
            "line 9: rank 0 after 1 ranks",
        ),
        (
            lambda text: text.replace("38.01    0.03    0.05      0", "38.01  0.03  0.05  3"),
            "line 28: 3 wrong results, expected 0: the run is broken",
        ),
        (lambda text: text.replace("38.01", "-----"), "line 28: expected a number in each column"),
        (lambda text: text.replace("38.01", "0"), "line 28: a time of 0"),
        (
            lambda text: "\n".join(line for line in text.splitlines() if " Rank " not in line),
            "results without the list of ranks",
        ),
    ],
)
def test_broken_nccl_tests(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        nccl_tests(change(read("nccl_two_nodes.txt")), TWO_NODES)
    assert "\n" not in str(caught.value)


def test_ranks_that_the_cluster_cannot_hold() -> None:
    with pytest.raises(
        InvalidInput, match="2 hosts x 8 ranks do not lie evenly on cluster h100-sxm"
    ):
        nccl_tests(read("nccl_two_nodes.txt"), Cluster.preset("h100-sxm"))


# Topology


@pytest.mark.parametrize("preset", ["v100", "h100-sxm"])
def test_the_levels_of_known_nodes_are_those_of_their_preset(preset: str) -> None:
    name = {"v100": "topo_cube.txt", "h100-sxm": "topo_switched.txt"}[preset]
    (level,) = node_levels(topology(read(name)), preset)
    inner = Cluster.preset(preset).levels[0]
    assert (level.name, level.span_devices) == ("nvlink", 8)
    assert level.bandwidth_bytes_per_s == inner.bandwidth_bytes_per_s
    assert (level.pair_bandwidth_bytes_per_s is None) == (inner.pair_bandwidth_bytes_per_s is None)


def test_paths_over_pcie_nest() -> None:
    found = topology(read("topo_pcie.txt"))
    assert (found.gpus, found.nics, found.nic_paths[0][7]) == (8, ("mlx5_bond_0",), "SYS")
    levels = node_levels(found, "a100-40g")
    assert [(level.name, level.span_devices) for level in levels] == [
        ("pcie-switch", 2),
        ("socket", 4),
        ("sockets", 8),
    ]
    assert levels[2].bandwidth_bytes_per_s < levels[1].bandwidth_bytes_per_s
    base = Cluster.preset("a100-40g", nodes=2)
    Cluster(
        name="pcie",
        device=base.device,
        nodes=2,
        devices_per_node=8,
        levels=(*levels, base.levels[-1]),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "no GPU here", "expected a matrix with the columns GPU0"),
        (
            lambda text: text.replace("NV1", "FOO", 1),
            "line 2: 'FOO' from GPU0 to GPU1, expected NV#",
        ),
        (lambda text: text.replace("NV1", "NV3", 1), "GPU0 to GPU1 is NV3, back it is NV1"),
        (lambda text: text.partition("GPU5\tSYS")[0], "no row of GPU5"),
        (lambda text: text.replace("NV2\tSYS\tPIX", "NV2", 1), "line 6: "),
    ],
)
def test_what_is_no_topology(change: Callable[[str], str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        topology(change(read("topo_cube.txt")))
    assert "\n" not in str(caught.value)


def test_a_device_whose_links_are_unknown() -> None:
    with pytest.raises(InvalidInput, match="unknown device with known links 'mi300x'"):
        node_levels(topology(read("topo_switched.txt")), "mi300x")
