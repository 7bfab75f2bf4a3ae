"""Clusters and devices: published figures, files there and back, errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shardwright.costmodel import Cluster, Device, Precision
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
    assert Cluster.preset_names() == PRESETS


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


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("nodes", [1, 4])
def test_a_cluster_file_loads_as_it_was_saved(name: str, nodes: int, tmp_path: Path) -> None:
    cluster = Cluster.preset(name, nodes)
    path = tmp_path / "cluster.yaml"
    cluster.save(path)
    assert Cluster.load(path) == cluster
    assert Cluster.parse(str(path)) == cluster


def test_a_hundred_thousand_devices_fit_in_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    Cluster.preset("h100-sxm", nodes=12_500).save(path)
    assert path.stat().st_size < 2000
    assert Cluster.load(path).world_size == 100_000


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
        ("levels:", "levels: {", "is not YAML"),
    ],
)
def test_bad_files(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        Cluster.load(_cluster_file(tmp_path, GOOD, old, new))
    assert "\n" not in str(caught.value)


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
