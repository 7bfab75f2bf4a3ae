"""Laws of measured curves and of where to measure next, on curves of the kind libraries make."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt
from pathlib import Path
from statistics import median

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwright.costmodel.cluster import Cluster
from shardwright.costmodel.curves import Curve, Reading
from shardwright.costmodel.probe_sizes import next_size, spread_sizes
from shardwright.ir.errors import InvalidInput

MIB = 2.0**20
GIB = 2.0**30
positive = st.floats(1e-9, 1e3)


@dataclass(frozen=True)
class Library:
    """Time as a library's: the fastest of protocols of one latency and bandwidth each, with a step
    where another algorithm takes over, and noise that only adds."""

    protocols: tuple[tuple[float, float], ...]
    step_at: float
    step: float
    noise: float
    seed: int

    def __call__(self, bytes: float) -> float:
        seconds = min(latency_s + bytes * each for latency_s, each in self.protocols)
        if bytes >= self.step_at:
            seconds *= self.step
        return seconds * (1 + self.noise * random.Random(f"{self.seed} {bytes}").random())


@st.composite
def libraries(draw: st.DrawFn) -> Library:
    latency_s, rate = draw(st.floats(1e-5, 5e-4)), draw(st.floats(1e10, 1e12))
    protocols = [(latency_s, 1 / rate)]
    if draw(st.booleans()):
        protocols.append((latency_s / draw(st.floats(1.5, 4)), draw(st.floats(2, 4)) / rate))
    return Library(
        tuple(protocols),
        draw(st.floats(MIB, GIB)),
        draw(st.floats(0.85, 1.15)),
        draw(st.sampled_from([0.0, 0.01, 0.02])),
        draw(st.integers(0, 1000)),
    )


@st.composite
def measurements(draw: st.DrawFn) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sizes = sorted(draw(st.sets(st.integers(1, 10**12), min_size=1, max_size=12)))
    times = draw(st.lists(positive, min_size=len(sizes), max_size=len(sizes)))
    return tuple(map(float, sizes)), tuple(times)


@given(measurements(), st.floats(0, 1e13), st.floats(0, 1e13))
def test_a_reading_never_falls_and_stays_at_or_above_zero(
    measured: tuple[tuple[float, ...], tuple[float, ...]], a: float, b: float
) -> None:
    reading = Reading.of(*measured)
    few, many = (reading.at(size) for size in sorted((a, b)))
    assert -1e-12 <= few <= many * (1 + 1e-9) + 1e-12


@given(measurements())
def test_a_reading_is_what_was_measured_unless_a_larger_size_took_less(
    measured: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
    sizes, times = measured
    reading = Reading.of(sizes, times)
    for i, size in enumerate(sizes):
        assert reading.at(size) == pytest.approx(min(times[i:]))


@given(
    st.floats(0, 1e-3),
    st.floats(1e-13, 1e-9),
    st.sets(st.integers(10, 10**11), min_size=2, max_size=8),
    st.floats(1, 1e11),
)
def test_one_latency_and_bandwidth_are_read_exactly_below_the_largest_size(
    latency_s: float, s_per_byte: float, chosen: set[int], size: float
) -> None:
    sizes = tuple(map(float, sorted(chosen)))
    reading = Reading.of(sizes, tuple(latency_s + s * s_per_byte for s in sizes))
    if size <= sizes[-1]:
        assert reading.at(size) == pytest.approx(latency_s + size * s_per_byte, rel=1e-6)
    else:
        assert reading.at(size) == pytest.approx(reading.at(sizes[-1]) * size / sizes[-1])


def test_outside_its_sizes_a_curve_keeps_its_time_below_and_its_bandwidth_above() -> None:
    flat = Curve(collective="all_reduce", shape=(8,), bytes=(1e6, 2e6, 4e6), seconds=(5, 5, 8))
    reading = flat.reading()
    assert reading.at(1) == 5
    assert reading.at(40e6) == 80
    steep = Reading.of((1e6, 2e6), (1.0, 3.0))  # steeper than a bandwidth
    assert steep.at(0.5e6) == 0.5
    assert Reading.of((1e6,), (1.0,)).at(10) == 1.0


def test_the_first_calls_of_a_process_do_not_make_small_messages_slow() -> None:
    """4 nodes of B200, ml-engineering: 32 KiB in 6.3 ms, 512 KiB in 0.36 ms."""
    sizes = (32768.0, 65536.0, 131072.0, 262144.0, 524288.0, 1048576.0)
    times = (6348.8e-6, 3174.4e-6, 564.34e-6, 381.88e-6, 357.68e-6, 378.33e-6)
    assert Reading.of(sizes, times).at(40000) == 357.68e-6


@given(libraries())
def test_eight_and_four_placed_probes_read_a_library_within_three_percent(library: Library) -> None:
    sizes = [MIB * 1024 ** (i / 60) for i in range(61)]
    chosen = _probed(library, sizes, 8, 4)
    reading = Reading.of(chosen, tuple(library(s) for s in chosen))
    assert median(abs(reading.at(s) / library(s) - 1) for s in sizes) <= 0.03


@pytest.mark.parametrize("step", [0.6, 0.75, 1.4, 2.0, 3.0])
@pytest.mark.parametrize("latency_s", [1e-5, 1e-4])
def test_probes_gather_around_a_step(step: float, latency_s: float) -> None:
    """Over many places of the step, placed probes enclose it closer than as many spread ones."""
    sizes = [MIB * 1024 ** (i / 200) for i in range(201)]
    placed, spread = [], []
    for i in range(10, 191, 4):
        step_at = sizes[i]

        def library(bytes: float, step_at: float = step_at) -> float:
            return (latency_s + bytes * 1e-11) * (step if bytes >= step_at else 1)

        for found, first, more in ((placed, 8, 4), (spread, 12, 0)):
            chosen = _probed(library, sizes, first, more)
            above = min(s for s in chosen if s >= step_at)
            found.append(log(above / max(s for s in chosen if s < step_at)))
    assert sum(placed) < 0.7 * sum(spread)


@given(libraries())
def test_every_probe_is_new_and_inside(library: Library) -> None:
    sizes = spread_sizes([MIB * 2**i for i in range(11)], 4)
    size = next_size(sizes, [library(s) for s in sizes])
    if size is not None:
        i = sum(s < size for s in sizes)
        assert sizes[i - 1] < size < sizes[i] and size == sqrt(sizes[i - 1] * sizes[i])


@given(libraries(), st.floats(0.03, 0.5))
def test_probing_ends_when_nothing_is_in_doubt(library: Library, tolerance: float) -> None:
    quiet = Library(library.protocols, library.step_at, 1.0, 0.0, 0)
    sizes = spread_sizes([MIB, GIB], 2)
    for _ in range(200):
        size = next_size(sizes, [quiet(s) for s in sizes], tolerance=tolerance)
        if size is None:
            break
        sizes = tuple(sorted((*sizes, size)))
    times = [quiet(s) for s in sizes]
    assert next_size(sizes, times, tolerance=tolerance) is None
    reading = Reading.of(sizes, tuple(times))
    for low, high in pairwise(sizes):
        middle = sqrt(low * high)
        assert reading.at(middle) == pytest.approx(quiet(middle), rel=tolerance * 1.01)


def test_pure_latency_and_pure_bandwidth_need_no_further_probe() -> None:
    sizes = (MIB, 32 * MIB, GIB)
    assert next_size(sizes, (1e-4, 1e-4, 1e-4)) is None
    assert next_size(sizes, tuple(s * 1e-11 for s in sizes)) is None
    # the middle of the interval where one gives way to the other, or what may be measured near it
    bend = (1e-4, 1e-4, 1e-3)
    assert next_size(sizes, bend) == pytest.approx(sqrt(32) * 32 * MIB)
    assert next_size(sizes, bend, [2 * MIB, 128 * MIB, 512 * MIB]) == 128 * MIB
    assert next_size(sizes, bend, [MIB / 2, GIB]) is None


@given(st.sets(st.floats(1, 1e12), min_size=1, max_size=30), st.integers(1, 40))
@example({1.0, 999999999999.998, 1e12}, 2)
def test_spread_sizes_are_as_many_as_asked_and_reach_both_ends(
    candidates: set[float], count: int
) -> None:
    chosen = spread_sizes(list(candidates), count)
    assert len(chosen) == min(count, len(candidates)) and set(chosen) <= candidates
    if len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (min(candidates), max(candidates))


def test_a_published_curve_is_read_within_three_percent() -> None:
    """vTrain trace/v100, 8 GPUs: it steps down at 15 MiB, where the protocol changes."""
    sizes = [m * MIB for m in (1, 2, 3, 5, 6, 8, 11, 15, 20, 28, 37, 50, 68, 92, 124, 168)]
    microseconds = (
        "79.93 101.3 123.8 170.2 188.0 237.9 301.4 261.3 322.9 422.0 550.8 724.2 968.8 1290.5 "
        "1720.2 2316.7"
    )
    times = dict(
        zip(
            sizes,
            map(float, microseconds.split()),
            strict=True,
        )
    )
    chosen = _probed(times.__getitem__, sizes, 8, 2)
    reading = Reading.of(chosen, tuple(times[s] for s in chosen))
    assert median(abs(reading.at(s) / times[s] - 1) for s in sizes if s not in chosen) <= 0.03


def _probed(
    library: Callable[[float], float], sizes: list[float], first: int, more: int
) -> tuple[float, ...]:
    chosen = spread_sizes(sizes, first)
    for _ in range(more):
        size = next_size(chosen, [library(s) for s in chosen], sizes)
        if size is None:
            break
        chosen = tuple(sorted((*chosen, size)))
    return chosen


def test_shapes_lose_what_they_do_not_cross() -> None:
    curve = Curve(collective="send", shape=(1, 2, 1, 1), bytes=(1,), seconds=(1,))
    assert curve.shape == (1, 2) and curve.size == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"collective": "gossip"}, "collective"),
        ({"shape": (1, 1)}, r"is \[1, 1\], expected units per level, each at least 1"),
        ({"shape": ()}, "expected units per level"),
        ({"shape": (8, 0)}, "expected units per level"),
        ({"bytes": ()}, "expected one or more sizes above 0"),
        ({"bytes": (0, 1)}, "expected one or more sizes above 0"),
        ({"bytes": (2, 1)}, r"\[1\] is 1 after 2, expected ascending sizes"),
        ({"bytes": (2, 2)}, "without repeats"),
        ({"seconds": (1, 0)}, r"\[1\] is 0, expected seconds above 0"),
        ({"seconds": (1, -1)}, r"\[1\] is -1, expected seconds above 0"),
        ({"seconds": (1, float("nan"))}, "finite"),
        ({"seconds": (1,)}, "seconds has 1 entries and bytes 2"),
        ({"unit": "ms"}, "unit"),
    ],
)
def test_bad_curves_say_what_is_wrong(change: dict[str, object], message: str) -> None:
    good = {"collective": "all_reduce", "shape": (8,), "bytes": (1, 2), "seconds": (1, 2)}
    Curve.model_validate(good)
    with pytest.raises(ValidationError, match=message):
        Curve.model_validate(good | change)


def test_a_bad_curve_in_a_cluster_file_names_field_and_line(tmp_path: Path) -> None:
    cluster = Cluster.preset("h100-sxm", nodes=2)
    curve = Curve(collective="send", shape=(1, 2), bytes=(1, 2), seconds=(3, 4.25), source="probe")
    path = tmp_path / "cluster.yaml"
    cluster.with_curves([curve]).save(path)
    assert Cluster.load(path).curves == (curve,)
    text = path.read_text()
    path.write_text(text.replace("4.25", "-4.25"))
    assert path.read_text() != text
    expected = r"line \d+: curves\[0\].seconds\[1\] is -4.25, expected seconds above 0$"
    with pytest.raises(InvalidInput, match=expected):
        Cluster.load(path)


def test_bad_measurements_are_refused() -> None:
    with pytest.raises(InvalidInput, match="2 sizes and 1 times"):
        next_size((1, 2), (1,))
    with pytest.raises(InvalidInput, match="size 1 is 1 bytes"):
        next_size((2, 1), (1, 1))
    with pytest.raises(InvalidInput, match="size 0 is 1 bytes in 0 s"):
        next_size((1, 2), (0, 1))
    with pytest.raises(InvalidInput, match="0 sizes of 1 candidates"):
        spread_sizes([1.0], 0)
