"""Laws of the torus: what its links allow, and the slices that were published."""

from __future__ import annotations

from itertools import product
from math import prod
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import shardwright as sw
from shardwright.costmodel import Cluster, CollectiveKind, Device, Group, Level, collective_seconds
from shardwright.costmodel.groups import hops
from shardwright.costmodel.torus import Torus
from shardwright.ir.errors import InvalidInput

KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "send",
)
TPUS = ("tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e")
LINK = 50e9


def slice_of(
    devices: int, torus: Torus, link: float = LINK, latency_s: float = 0.0, achieved: float = 1.0
) -> Cluster:
    level = Level(
        name="ici",
        span_devices=devices,
        latency_s=latency_s,
        bandwidth_bytes_per_s=link * torus.links_per_device,
        achieved_fraction=achieved,
        torus=torus,
    )
    device = Device.preset("tpu-v5p")
    return Cluster(name="s", device=device, nodes=devices, devices_per_node=1, levels=(level,))


tori = st.builds(
    Torus, dims=st.integers(1, 3), ring_devices=st.sampled_from([2, 4, 16]),
    whole_blocks=st.booleans(),
)  # fmt: skip


@st.composite
def groups(draw: st.DrawFn, devices: int) -> Group:
    size = draw(st.integers(2, devices))
    return Group(size, draw(st.integers(1, (devices - 1) // (size - 1))))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Torus, Group]:
    devices = draw(st.sampled_from([2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256]))
    return devices, draw(tori), draw(groups(devices))


@pytest.mark.parametrize(
    ("dims", "topology"),
    [
        *((3, t) for t in ("1x2x2", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8",
                           "8x8x16", "8x16x16", "16x16x16", "16x16x24")),
        *((2, t) for t in ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    ],
)  # fmt: skip
def test_slices_have_the_published_topologies(dims: int, topology: str) -> None:
    shape = tuple(int(length) for length in topology.split("x"))
    assert Torus(dims=dims, ring_devices=4).shape(prod(shape)) == shape


@given(devices=st.integers(1, 300), dims=st.integers(1, 3))
def test_the_shape_is_the_one_nearest_to_a_cube(devices: int, dims: int) -> None:
    divisors = [d for d in range(1, devices + 1) if devices % d == 0]
    every = [s for s in product(divisors, repeat=dims) if prod(s) == devices]
    shape = Torus(dims=dims, ring_devices=4).shape(devices)
    assert shape in every and list(shape) == sorted(shape)
    assert sum(shape) == min(sum(other) for other in every)


@pytest.mark.parametrize(
    ("preset", "devices", "published_tbytes_per_s"),
    [("tpu-v4", 4096, 24), ("tpu-v5e", 256, 1.6), ("tpu-v6e", 256, 3.2)],
)
def test_the_bisection_of_a_pod_is_the_published_one(
    preset: str, devices: int, published_tbytes_per_s: float
) -> None:
    # a quarter of an all-to-all's bytes cross the middle each way; 0.9 of the links is reached
    cluster = Cluster.preset(preset, devices // 4)
    bytes = 1e15
    seconds = collective_seconds(cluster, "all_to_all", bytes, Group(devices))
    assert bytes / 4 / seconds / 0.9 == pytest.approx(published_tbytes_per_s * 1e12, rel=0.07)


@pytest.mark.parametrize(("preset", "chips", "rings"), [
    ("tpu-v5p", 32, (False, False, False)),
    ("tpu-v5p", 64, (True, True, True)),
    ("tpu-v5e", 64, (False, False)),
    ("tpu-v5e", 128, (False, True)),
    ("tpu-v6e", 256, (True, True)),
])  # fmt: skip
def test_slices_close_into_rings_where_they_have_links(
    preset: str, chips: int, rings: tuple[bool, ...]
) -> None:
    torus = Cluster.preset(preset, chips // 4).levels[0].torus
    assert torus is not None and torus.rings(torus.shape(chips)) == rings


@given(n=st.integers(2, 64), bytes=st.floats(1, 1e12), latency_s=st.floats(0, 1e-5))
def test_a_ring_sends_both_ways_at_once(n: int, bytes: float, latency_s: float) -> None:
    ring = slice_of(n * 2, Torus(dims=1, ring_devices=2), latency_s=latency_s)
    every_other = (n - 1) / n * bytes / LINK + latency_s * (1 + 2 * (n // 2))
    found = collective_seconds(ring, "all_gather", bytes, Group(n, 2))
    assert found == pytest.approx(every_other)  # two such groups share the links
    ring = slice_of(n if n % 2 == 0 else 2 * n, Torus(dims=1, ring_devices=2), latency_s=latency_s)
    size = ring.world_size
    whole = (size - 1) / size * bytes / (2 * LINK) + latency_s * (1 + size // 2)
    for kind, times in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        found = collective_seconds(ring, kind, bytes, Group(size))  # type: ignore[arg-type]
        assert found == pytest.approx(times * whole)


@given(n=st.integers(2, 64), bytes=st.floats(1, 1e12))
def test_a_line_waits_for_the_one_link_of_its_end(n: int, bytes: float) -> None:
    line = slice_of(n, Torus(dims=1, ring_devices=1000))
    found = collective_seconds(line, "all_gather", bytes, Group(n))
    assert found == pytest.approx((n - 1) / n * bytes / LINK)


@given(
    kind=st.sampled_from(KINDS), side=st.sampled_from([2, 3, 4, 8, 16]), closed=st.booleans(),
    bytes=st.floats(0, 1e12), latency_s=st.floats(0, 1e-5),
)  # fmt: skip
def test_two_dims_are_no_slower_than_one(
    kind: CollectiveKind, side: int, closed: bool, bytes: float, latency_s: float
) -> None:
    ring = side if closed else 1000
    seconds = [
        collective_seconds(slice_of(side**2, Torus(dims=dims, ring_devices=ring), LINK, latency_s),
                           kind, bytes, Group(side**2))
        for dims in (1, 2)
    ]  # fmt: skip
    assert seconds[1] <= seconds[0] * (1 + 1e-9)


@given(case=cases(), kind=st.sampled_from(KINDS), bytes=st.floats(0, 1e12), factor=st.floats(1, 9))
def test_more_links_are_never_slower(
    case: tuple[int, Torus, Group], kind: CollectiveKind, bytes: float, factor: float
) -> None:
    devices, torus, group = case
    base = collective_seconds(slice_of(devices, torus, LINK, 1e-6), kind, bytes, group)
    faster = collective_seconds(slice_of(devices, torus, LINK * factor, 1e-6), kind, bytes, group)
    opened = torus.model_copy(update={"ring_devices": 1000})
    line = collective_seconds(slice_of(devices, opened, LINK, 1e-6), kind, bytes, group)
    assert faster <= base * (1 + 1e-9)
    assert base <= line * (1 + 1e-9)


@given(case=cases(), bytes=st.floats(1, 1e12))
def test_no_group_sends_more_than_its_links_carry(
    case: tuple[int, Torus, Group], bytes: float
) -> None:
    # every rank receives all but its own part, and no device has more than its links
    devices, torus, group = case
    cluster = slice_of(devices, torus)
    least = (group.size - 1) / group.size * bytes / (LINK * torus.links_per_device)
    assert collective_seconds(cluster, "all_gather", bytes, group) >= least * (1 - 1e-9)


@given(devices=st.sampled_from([4, 8, 16, 27, 32, 64, 256]), torus=tori, bytes=st.floats(1, 1e12))
def test_an_all_to_all_routed_link_by_link_loads_no_link_more(
    devices: int, torus: Torus, bytes: float
) -> None:
    # by hand: every pair's message dim by dim, the shorter way round, half each way where equal
    shape = torus.shape(devices)
    busiest = 0.0
    for length, ring in zip(shape, torus.rings(shape), strict=True):
        load = [0.0] * length  # of the links upwards, in messages between coordinates
        for source, target in product(range(length), repeat=2):
            up = (target - source) % length if ring else target - source
            share = 0.5 if ring and 2 * up == length else float(0 <= 2 * up < length or not ring)
            for hop in range(max(up, 0)):
                load[(source + hop) % length] += share
        # each coordinate pair stands for (devices/length)² ranks' pairs over devices/length links
        busiest = max(busiest, max(load) * devices / length)
    expected = busiest * bytes / devices**2 / LINK
    found = collective_seconds(slice_of(devices, torus), "all_to_all", bytes, Group(devices))
    assert found == pytest.approx(expected)


@given(case=cases(), bytes=st.floats(1, 1e12))
def test_an_all_to_all_takes_the_bisection_at_least(
    case: tuple[int, Torus, Group], bytes: float
) -> None:
    devices, torus, _ = case
    shape = torus.shape(devices)
    longest = shape[-1]
    cut_links = (2 if torus.rings(shape)[-1] else 1) * devices // longest
    crossing = bytes * (longest // 2) * (longest - longest // 2) / longest**2
    found = collective_seconds(slice_of(devices, torus), "all_to_all", bytes, Group(devices))
    assert found >= crossing / (cut_links * LINK) * (1 - 1e-9)


@given(stride=st.sampled_from([1, 2, 4, 8, 16, 32]), bytes=st.floats(1, 1e12))
def test_a_send_takes_a_hop_for_each_link(stride: int, bytes: float) -> None:
    cluster = slice_of(64, Torus(dims=2, ring_devices=16), latency_s=1e-6)  # 8 x 8
    hops_between = stride if stride < 8 else stride // 8
    found = collective_seconds(cluster, "send", bytes, Group(2, stride))
    assert found == pytest.approx(1e-6 * (1 + hops_between) + bytes * hops_between / LINK)


@given(case=cases())
def test_a_group_crosses_as_many_devices_as_it_has(case: tuple[int, Torus, Group]) -> None:
    devices, torus, group = case
    (hop,) = hops(slice_of(devices, torus), group)
    assert hop.units == group.size


@pytest.mark.parametrize("name", TPUS)
def test_presets_of_many_slices_load_as_saved(name: str, tmp_path: Path) -> None:
    cluster = Cluster.preset(name, 2 * (64 if name in ("tpu-v5e", "tpu-v6e") else 1536))
    cluster.save(tmp_path / "slices.yaml")
    assert Cluster.load(tmp_path / "slices.yaml") == cluster
    ici, network = cluster.levels
    assert ici.span_devices < network.span_devices == cluster.world_size
    assert cluster.resized(16).levels[0].torus == ici.torus


@pytest.mark.parametrize("preset, tflops", [
    ("tpu-v4", 275), ("tpu-v5e", 197), ("tpu-v5p", 459), ("tpu-v6e", 918),
])  # fmt: skip
def test_products_of_float32_are_six_passes(preset: str, tflops: float) -> None:
    device = Device.preset(preset)
    assert device.peak("bfloat16") == tflops * 1e12
    assert device.peak("float32") == pytest.approx(tflops * 1e12 / 6, rel=1e-2)


@pytest.mark.parametrize(
    ("level", "change", "message"),
    [
        (0, {"pair_bandwidth_bytes_per_s": 1e9}, "pair_bandwidth_bytes_per_s is given for a torus"),
        (0, {"fabric": {"mode": "ecmp"}}, "fabric is given for a torus"),
        (0, {"torus": {"dims": 4, "ring_devices": 4}}, "torus.dims is 4"),
        (1, {"torus": {"dims": 2, "ring_devices": 4}}, "a torus outside of 'ici'"),
    ],
)
def test_a_torus_is_the_innermost_level_and_has_no_switch(
    level: int, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    Cluster.preset("tpu-v5p", 16).save(path)
    data = yaml.safe_load(path.read_text())
    data["levels"][level] |= change
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(InvalidInput, match=message):
        Cluster.load(path)


@pytest.mark.parametrize("name", TPUS)
def test_a_plan_on_tpus_keeps_the_bounds_and_is_predicted_alike(name: str) -> None:
    work = sw.Workload(global_batch=128, seq_len=4096)
    cluster = Cluster.parse(f"{name}:16")
    plan = sw.plan("llama-3.1-8b", cluster, work)
    chosen = plan.strategy
    fix = {key: getattr(chosen, key) for key in ("pp", "dp", "tp", "zero", "micro_batch")}
    # layers of a plan may recompute differently, all of a fixed configuration do alike
    least, most = (
        sw.predict("llama-3.1-8b", cluster, work, fix | {"recompute": mode}).step_seconds
        for mode in ("none", "full")
    )
    assert least * 0.99 <= plan.predicted.step_seconds <= most * 1.01
    # 6 FLOPs per parameter and token at the peak
    flops = 6 * 8.03e9 * 128 * 4096
    assert plan.predicted.step_seconds > flops / cluster.peak_flops_per_s("bfloat16")
