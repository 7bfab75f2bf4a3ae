"""Clusters and devices: published figures, files there and back, errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from cluster_cases import clusters
from hypothesis import HealthCheck, given, settings

from shardwright.costmodel import Cluster, Device, Precision
from shardwright.costmodel.cluster import Degraded, Island, Level, Pair
from shardwright.costmodel.curves import Curve
from shardwright.ir.errors import InvalidInput

PRESETS = (
    "v100",
    "a100-40g",
    "a100-80g",
    "h100-sxm",
    "h200",
    "b200",
    "gb200-nvl72",
    "mi250x",
    "mi300x",
    "local",
)


def test_the_promised_presets_are_there() -> None:
    assert set(PRESETS) <= set(Cluster.preset_names())


@pytest.mark.parametrize(
    ("name", "dense_tflops", "hbm_gbytes_per_s", "scale_up_gbytes_per_s", "nic_gbytes_per_s"),
    [
        # as published by the makers; the project's gpu_facts.csv has them too
        ("v100", 125, 900, 150, 6.25),
        ("a100-40g", 312, 1555, 300, 25),
        ("a100-80g", 312, 2039, 300, 25),
        ("h100-sxm", 989, 3350, 450, 50),
        ("h200", 989, 4800, 450, 50),
        ("b200", 2250, 8000, 900, 50),
        ("gb200-nvl72", 2500, 8000, 900, 50),
        ("mi250x", 191.5, 1638, 200, 12.5),
        ("mi300x", 1307, 5300, 448, 50),
    ],
)
def test_presets_hold_published_figures(
    name: str,
    dense_tflops: float,
    hbm_gbytes_per_s: float,
    scale_up_gbytes_per_s: float,
    nic_gbytes_per_s: float,
) -> None:
    cluster = Cluster.preset(name, nodes=2)
    assert cluster.device.peak("float16") == pytest.approx(dense_tflops * 1e12, rel=1e-3)
    assert cluster.device.memory_bandwidth_bytes_per_s == pytest.approx(
        hbm_gbytes_per_s * 1e9, rel=1e-3
    )
    assert cluster.levels[0].bandwidth_bytes_per_s == scale_up_gbytes_per_s * 1e9
    assert cluster.levels[-1].bandwidth_bytes_per_s == nic_gbytes_per_s * 1e9


@pytest.mark.parametrize(
    ("name", "gbytes"),
    [
        ("v100", 32),
        ("a100-40g", 40),
        ("h100-sxm", 80),
        ("h200", 141),
        ("b200", 180),
        ("mi250x", 64),
    ],
)
def test_memory_is_what_the_driver_reports_of_the_name(name: str, gbytes: int) -> None:
    device = Cluster.preset(name).device
    assert 0.97 * gbytes * 1e9 < device.memory_bytes < 1.08 * gbytes * 1e9
    assert 0.9 * device.memory_bytes < device.memory_limit_bytes < device.memory_bytes


@pytest.mark.parametrize(
    ("spec", "nodes", "per_node", "spans"),
    [
        ("h100-sxm:16", 16, 8, [8, 128]),
        ("a100-40g:4x8", 4, 8, [8, 32]),
        ("h200", 1, 8, [8, 8]),
        ("v100:3x4", 3, 4, [4, 12]),
        ("mi250x:2", 2, 8, [2, 8, 16]),
        ("mi250x:2x3", 2, 3, [3, 6]),  # modules of 2 do not divide nodes of 3
        ("gb200-nvl72:2", 2, 72, [72, 144]),
        ("gb200-nvl72:16x4", 16, 4, [64, 64]),  # 16 trays in one rack
        ("gb200-nvl72:128x4", 128, 4, [64, 512]),  # 16 of a rack's 18 trays
    ],
)
def test_specs(spec: str, nodes: int, per_node: int, spans: list[int]) -> None:
    cluster = Cluster.parse(spec)
    assert (cluster.nodes, cluster.devices_per_node) == (nodes, per_node)
    assert [level.span_devices for level in cluster.levels] == spans
    assert cluster.world_size == nodes * per_node


@pytest.mark.parametrize("name", Cluster.preset_names())
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_cluster_file_loads_as_it_was_saved(name: str, nodes: int, tmp_path: Path) -> None:
    cluster = Cluster.preset(name, nodes)
    path = tmp_path / "cluster.yaml"
    cluster.save(path)
    assert Cluster.load(path) == cluster
    assert Cluster.parse(str(path)) == cluster


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cluster=clusters())
def test_any_cluster_loads_as_it_was_saved(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    cluster.save(path)
    loaded = Cluster.load(path)
    assert loaded == cluster
    assert hash(loaded) == hash(cluster)
    assert Cluster.model_validate(cluster.model_dump(mode="json")) == cluster


def test_a_hundred_thousand_devices_fit_in_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    Cluster.preset("h100-sxm", nodes=12_500).save(path)
    assert path.stat().st_size < 2000
    assert Cluster.load(path).world_size == 100_000


def large() -> Cluster:
    """100,000 devices in five islands, 400 measured links, 50 slow nodes, 40 measured curves."""
    link = {"latency_s": 1.0e-5, "bandwidth_bytes_per_s": 5.0e10}
    return Cluster(
        name="large",
        device=Device.preset("h100-sxm"),
        nodes=12_500,
        devices_per_node=8,
        levels=(
            Level(name="nvlink", span_devices=8, **link),
            Level(name="rack", span_devices=80, **link),
            Level(name="nic", span_devices=20_000, whole_island=True, **link),
            Level(name="ethernet", span_devices=100_000, **link),
        ),
        islands=tuple(Island(name=f"island {i}", nodes=2500, network="roce") for i in range(5)),
        pairs=tuple(
            Pair(nodes=(7 * i, 31 * i + 1), bandwidth_bytes_per_s=1.0e10 + i, latency_s=2.0e-5)
            for i in range(400)
        ),
        degraded=tuple(Degraded(nodes=(i,), bandwidth_fraction=0.5) for i in range(0, 500, 10)),
        curves=tuple(
            Curve(
                collective="all_reduce",
                shape=(8, i),
                bytes=tuple(float(2**k) for k in range(10, 30)),
                seconds=tuple(1e-5 + 2.0**k / 3e11 * i for k in range(10, 30)),
            )
            for i in range(2, 11)
        ),
    )


def test_so_do_islands_and_hundreds_of_measured_links(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    cluster = large()
    cluster.save(path)
    assert path.stat().st_size < 100_000
    assert Cluster.load(path) == cluster
    assert cluster.slowest_link(range(100_000)).bandwidth_bytes_per_s == 10e9


@pytest.mark.parametrize("line", [3, 150, 399])
def test_errors_deep_in_a_large_file_name_the_line(line: int, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    large().save(path)
    lines = path.read_text().splitlines()
    first = lines.index("pairs:") + 1
    at = first + line
    lines[at] = lines[at].replace("latency_s: 2.0e-05", "latency_s: -1")
    path.write_text("\n".join(lines))
    expected = rf"line {at + 1}: pairs\[{line}\].latency_s is -1, expected greater than"
    with pytest.raises(InvalidInput, match=expected):
        Cluster.load(path)
    lines[at] = lines[at - 1]
    path.write_text("\n".join(lines))
    expected = rf"line {at + 1}: pairs\[{line}\].nodes is .* pairs\[{line - 1}\] gives already"
    with pytest.raises(InvalidInput, match=expected):
        Cluster.load(path)


def test_a_device_file_loads_as_it_was_saved(tmp_path: Path) -> None:
    for name in Device.preset_names():
        Device.preset(name).save(tmp_path / "device.yaml")
        assert Device.load(tmp_path / "device.yaml") == Device.preset(name)


def test_a_dtype_without_units_runs_at_the_next_wider_one() -> None:
    assert Device.preset("v100").peak("bfloat16") == 15.7e12
    assert Device.preset("a100-80g").peak("float8") == 312e12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h10-sxm:2", "'h10-sxm': did you mean h100-sxm"),
        ("quantum:2", "known are a100-40g"),
        ("h100-sxm:0", "nodes is 0"),
        ("h100-sxm:2x0", "devices_per_node is 0"),
        ("h100-sxm:two", "expected PRESET:NODES"),
        ("", "expected PRESET:NODES"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Cluster.parse(spec)


def _cluster_file(folder: Path, text: str, old: str = "", new: str = "") -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text.replace(old, new) if old else text)
    return path


GOOD = """\
name: two
device: a100-80g
nodes: 2
devices_per_node: 8
levels:
  - {name: nvlink, span_devices: node, latency_s: 5.0e-6, bandwidth_bytes_per_s: 300.0e+9}
  - name: infiniband
    span_devices: cluster
    latency_s: 1.0e-5
    bandwidth_bytes_per_s: 25.0e+9
"""


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    cluster = Cluster.load(_cluster_file(tmp_path, GOOD))
    assert cluster.device == Device.preset("a100-80g")
    assert [level.span_devices for level in cluster.levels] == [8, 16]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.0e-5", "-1.0e-5", r"line 9: levels\[1\].latency_s is -1e-05, expected greater than"),
        ("nodes: 2", "nodes: many", "line 3: nodes is 'many', expected a valid integer"),
        ("nodes: 2", "", "cluster.yaml.*nodes is missing"),
        ("nodes: 2", "nodes: 2\ncolour: red", "line 4: unknown field colour = 'red'"),
        ("a100-80g", "a100-80", "line 2: device: unknown device 'a100-80': did you mean a100-80g"),
        ("cluster\n", "12\n", r"levels\[1\].span_devices is 12, expected a multiple of 8"),
        ("cluster\n", "24\n", "is 24, expected the whole cluster: 2 nodes x 8 = 16"),
        ("cluster\n", "rack\n", r"line 8: levels\[1\].span_devices is 'rack'"),
        ("25.0e+9", ".inf", r"line 10: levels\[1\].bandwidth_bytes_per_s is inf"),
        ("nodes: 2", "nodes: 2\nnodes: 3", "line 4: field nodes is given twice, first in line 3"),
        ("cluster\n", "20\n", r"levels\[1\].span_devices is 20, expected a multiple of 8"),
        ("node,", "3,", r"line 6: levels\[0\].span_devices is 3, expected part of a node"),
        ("cluster\n", "island\n", r"line 8: levels\[1\].span_devices is 'island'"),
        ("levels:", "levels: {", "line 6: is not YAML"),
        ("2\n", "yes\n", "line 3: nodes is true, expected a whole number"),
        ("2\n", ".nan\n", "line 3: nodes is nan, expected a finite number"),
    ],
)
def test_bad_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        Cluster.load(_cluster_file(tmp_path, GOOD, old, new))
    assert "\n" not in str(caught.value)


ISLANDS = """\
name: mixed
device: a100-80g
nodes: 10
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
    levels: [{name: nic, bandwidth_bytes_per_s: 50.0e+9}]
pairs:
  - {nodes: [0, 1], bandwidth_bytes_per_s: 10.0e+9}
  - {islands: [old, new], latency_s: 5.0e-5}
degraded:
  - {nodes: [2, 5], bandwidth_fraction: 0.5}
matrix:
  rows:
    - "-"
    - "20000 -"
    - "19900 12000 -"
curves:
  - collective: all_reduce
    shape: [8, 4]
    bytes: [1.0e+6, 1.0e+7]
    seconds: [1.0e-4, 5.0e-4]
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # a link that is missing
        (
            "  - {name: ethernet",
            "  # {name: ethernet",
            r"line 7: levels\[1\].span_devices is 'island'"
            ".*nothing joins islands 'old' and 'new': add a level for the cluster",
        ),
        (
            '"19900 12000 -"',
            '"19900 - -"',
            r"line 24: matrix.rows\[2\] has no bandwidth from node 2 "
            "to node 1, expected a number",
        ),
        ('"19900 12000 -"', '"19900 -"', r"line 24: matrix.rows\[2\] has 2 entries, expected 3"),
        (
            '"19900 12000 -"',
            '"19900 1x -"',
            r"line 24: matrix.rows\[2\] holds '1x', expected whole",
        ),
        ('"20000 -"', '"-20000 -"', r"line 23: matrix.rows\[1\] holds '-20000', expected whole"),
        ("nodes: 10", "nodes: 9", "line 3: nodes is 9, expected 10, the nodes of the islands"),
        ("[0, 1]", "[0, 10]", r"line 16: pairs\[0\].nodes is \[0, 10\], expected nodes 0 to 9"),
        ("[0, 1]", "[0]", r"line 16: pairs\[0\].nodes\[1\] is missing"),
        ("[0, 1]", "[0, 1, 2]", r"line 16: pairs\[0\].nodes is \[0, 1, 2\], expected at most 2"),
        ("[0, 1]", "[1, 1]", r"line 16: pairs\[0\].nodes is \[1, 1\], expected two different ends"),
        ("[0, 1]", "[0, -1]", r"line 16: pairs\[0\].nodes\[1\] is -1, expected greater than"),
        (
            "10.0e+9}",
            "-1}",
            r"line 16: pairs\[0\].bandwidth_bytes_per_s is -1, expected greater than",
        ),
        (
            "10.0e+9}",
            ".nan}",
            r"line 16: pairs\[0\].bandwidth_bytes_per_s is nan, expected a finite",
        ),
        (
            "10.0e+9}",
            "1, bandwidth_fraction: 0.5}",
            r"line 16: pairs\[0\].bandwidth_fraction is given"
            " beside bandwidth_bytes_per_s",
        ),
        (
            ", bandwidth_bytes_per_s: 10.0e+9",
            "",
            r"line 16: pairs\[0\].bandwidth_bytes_per_s is miss",
        ),
        ("nodes: [0, 1]", "devices: [0, 80]", r"line 16: pairs\[0\].devices is .* 0 to 79"),
        (
            "nodes: [0, 1],",
            "",
            r"line 16: pairs\[0\]: expected one of devices, nodes, islands, got n",
        ),
        (
            "[old, new]",
            "[old, never]",
            r"line 17: pairs\[1\].islands names the unknown island 'never'"
            ": did you mean new",
        ),
        (
            "  - {islands: [old, new], latency",
            "  - {nodes: [0, 1], latency",
            r"line 17: pairs\[1\].nodes is \[0, 1\], which pairs\[0\] gives already",
        ),
        ("[2, 5]", "[2, 12]", r"line 19: degraded\[0\].nodes names node 12, expected 0 to 9"),
        (
            "[2, 5]",
            "[2, 2]",
            r"line 19: degraded\[0\].nodes names node 2, which degraded\[0\] does",
        ),
        (
            "bandwidth_fraction: 0.5",
            "compute_fraction: 1",
            r"line 19: degraded\[0\].bandwidth_fraction"
            " is missing",
        ),
        (
            "infiniband",
            "infinband",
            r"line 10: islands\[0\].network is 'infinband': did you mean "
            "infiniband",
        ),
        (
            "h100-sxm",
            "h100",
            r"line 13: islands\[1\].device: unknown device 'h100': did you mean .*h100-sxm",
        ),
        ("name: new", "name: old", r"line 11: islands\[1\].name is 'old' as islands\[0\].name"),
        (
            "[{name: nic",
            "[{name: nik",
            r"line 14: islands\[1\].levels\[0\].name is 'nik', expected the"
            " name of a level of the cluster: did you mean .*nic",
        ),
        (
            "span_devices: island",
            "span_devices: 24",
            r"line 8: levels\[2\].span_devices is 80, "
            "expected a multiple of 24",
        ),
        ("  rows:", "  first_node: 8\n  rows:", "line 22: matrix.rows has 3 nodes from node 8 on"),
        (
            "[8, 4]",
            "[16, 2]",
            r"line 27: curves\[0\].shape is \[16, 2\], expected at most 8 devices in"
            " level 'nvlink'",
        ),
    ],
)
def test_bad_islands_pairs_and_matrices(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert Cluster.load(_cluster_file(tmp_path, ISLANDS)).world_size == 80
    assert old in ISLANDS
    with pytest.raises(InvalidInput, match=f"cluster.yaml, {message}") as caught:
        Cluster.load(_cluster_file(tmp_path, ISLANDS, old, new))
    assert "\n" not in str(caught.value)


def test_levels_outside_islands_hold_whole_ones(tmp_path: Path) -> None:
    building = (
        "  - {name: building, span_devices: 16, latency_s: 0, bandwidth_bytes_per_s: 1.0e+9}\n"
    )
    text = ISLANDS.replace("  - {name: ethernet", building + "  - {name: ethernet")
    text = text.replace("[8, 4]", "[8, 2]")
    with pytest.raises(
        InvalidInput, match="is 16, expected whole islands, which end at device 32, 80"
    ):
        Cluster.load(_cluster_file(tmp_path, text))


def test_files_that_are_no_mapping(tmp_path: Path) -> None:
    for text in ("", "- 1\n- 2\n", "just words"):
        with pytest.raises(InvalidInput, match="expected a mapping"):
            Cluster.load(_cluster_file(tmp_path, text))
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InvalidInput, match="not a text file"):
        Cluster.load(path)


def test_a_reserve_larger_than_memory_is_an_error(tmp_path: Path) -> None:
    data = Device.preset("v100").model_dump(exclude_none=True) | {"reserve_bytes": 10**12}
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InvalidInput, match="reserve_bytes is 1000000000000, expected less than"):
        Device.load(tmp_path / "device.yaml")


def test_precisions() -> None:
    assert Precision.preset("bf16").element_bytes("model") == 2
    assert Precision.preset("bf16").element_bytes("wide") == 4
    assert Precision.preset("fp64").element_bytes("wide") == 8
    with pytest.raises(InvalidInput, match="did you mean bf16"):
        Precision.preset("bf61")
