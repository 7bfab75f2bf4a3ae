"""Calibration: efficiency curves, the grid that is measured, and the device that comes of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import exp, log
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwright.costmodel import Device, Precision, Runtime, local_sizes
from shardwright.costmodel.calibrate import run_calibrate
from shardwright.costmodel.calibrate.cases import PRODUCTS_ONLY, Case, levels
from shardwright.costmodel.calibrate.command import implausible
from shardwright.costmodel.calibrate.device_file import device_of
from shardwright.costmodel.calibrate.machine import Machine
from shardwright.costmodel.calibrate.measure import KINDS, Key, Point, Samples, _allowed_s, _Climb
from shardwright.costmodel.efficiency import Direction, EfficiencyCurve
from shardwright.costmodel.kernels import Kernels
from shardwright.ir import InvalidInput
from shardwright.ir.graph import Graph, Value
from shardwright.ir.refine import RawGraph, RawOp, refine

# --- curves --------------------------------------------------------------------------------------

points = st.lists(
    st.tuples(st.floats(1.0, 1e15), st.floats(1e3, 1e15)),
    min_size=1,
    max_size=8,
    unique_by=lambda point: round(log(point[0]), 3),
).map(sorted)


def curve(given_points: list[tuple[float, float]]) -> EfficiencyCurve:
    work, rates = zip(*given_points, strict=True)
    return EfficiencyCurve(kind="matmul", dtype="float32", work=work, rate_per_s=rates)


@given(points)
def test_a_curve_passes_through_its_points(given_points: list[tuple[float, float]]) -> None:
    measured = curve(given_points)
    for work, rate in given_points:
        assert measured.seconds(work) == pytest.approx(work / rate, rel=1e-9)


@given(points, st.floats(0.0, 1.0))
def test_between_points_time_lies_between_theirs(
    given_points: list[tuple[float, float]], share: float
) -> None:
    measured = curve(given_points)
    for (left, slow), (right, fast) in pairwise(given_points):
        work = exp((1 - share) * log(left) + share * log(right))
        ends = sorted((left / slow, right / fast))
        assert ends[0] * (1 - 1e-9) <= measured.seconds(work) <= ends[1] * (1 + 1e-9)


@given(points, st.floats(1.0, 1e6))
def test_beyond_its_points_a_curve_keeps_the_launch_and_the_rate(
    given_points: list[tuple[float, float]], times: float
) -> None:
    measured = curve(given_points)
    (least, first_rate), (most, last_rate) = given_points[0], given_points[-1]
    assert measured.seconds(least / times) == pytest.approx(least / first_rate)
    assert measured.seconds(most * times) == pytest.approx(most * times / last_rate)
    assert measured.seconds(0.0) == 0.0


@given(st.floats(1e-12, 1e-3), st.floats(0.0, 2.0), st.floats(1.0, 1e9))
def test_power_laws_are_exact(scale: float, power: float, work: float) -> None:
    sizes = (1.0, 1e4, 1e9)
    rates = tuple(size / (scale * size**power) for size in sizes)
    measured = EfficiencyCurve(kind="copy", dtype="float32", work=sizes, rate_per_s=rates)
    assert measured.seconds(work) == pytest.approx(scale * work**power, rel=1e-9)


@pytest.mark.parametrize(
    ("work", "rates", "message"),
    [
        ((1.0, 2.0), (1.0,), "work has 2 points and rate_per_s 1, expected as many of each"),
        ((2.0, 1.0), (1.0, 1.0), "work has 2 before 1, expected ascending"),
        ((0.0, 1.0), (1.0, 1.0), "work has 0, expected more than 0"),
        ((1.0, 2.0), (1.0, -1.0), "rate_per_s has -1, expected more than 0"),
        ((), (), "at least 1 item"),
        ((1.0,), (float("nan"),), "finite number"),
    ],
)
def test_what_is_no_curve_is_refused(
    work: tuple[float, ...], rates: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        EfficiencyCurve(kind="copy", dtype="float32", work=work, rate_per_s=rates)


# --- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", [False, True])
def test_levels_climb_and_their_shapes_have_equal_work(coarse: bool) -> None:
    found: dict[Key, list[float]] = {}
    for turn in levels(KINDS, ("float32", "bfloat16", "tf32"), coarse):
        for cases in turn:
            for direction in cases[0].directions:
                work = [case.work(direction) for case in cases]
                assert max(work) / min(work) < 1.15  # rows of a norm share one weight
                found.setdefault((cases[0].kind, cases[0].dtype, direction), []).append(work[0])
    assert {kind for kind, _, _ in found} == set(KINDS)
    assert {kind for kind, dtype, _ in found if dtype in PRODUCTS_ONLY} == {"matmul"}
    assert sum(kind == "copy" for kind, _, _ in found) == 1
    for sizes in found.values():
        assert len(sizes) == (7 if coarse else 14)
        assert all(b / a >= 3.5 for a, b in pairwise(sizes))


def one_op(kind: str, operands: list[tuple[int, ...]], result: tuple[int, ...]) -> Graph:
    """A graph of one op on whole tensors; a second operand of a norm or product is a weight."""
    names = [f"x{k}" for k in range(len(operands))]
    values = {name: Value(name, tuple((d,) for d in shape)) for name, shape in
              zip([*names, "y"], [*operands, result], strict=True)}  # fmt: skip
    weights = tuple(names[1:]) if kind in ("linear", "rms_norm") else ()
    for name in weights:
        values[name] = replace(values[name], role="parameter")
    inputs = tuple(name for name in names if name not in weights)
    attributes = {"causal": True} if kind == "attention" else {}
    op = RawOp(kind, kind, tuple(names), ("y",), attributes)
    return refine({"g": RawGraph(values, (op,), inputs, weights, ("y",))})["g"]


ROWS, HIDDEN, WIDER, MAPS, HEAD = 96, 64, 256, 8, 16
SQUARE, HEADS = (ROWS, HIDDEN), (1, MAPS, ROWS, HEAD)
COUNTED: dict[Case, list[Graph]] = {
    Case("matmul", "float32", 0, (ROWS, HIDDEN, WIDER)): [
        one_op("linear", [SQUARE, (WIDER, HIDDEN)], (ROWS, WIDER))
    ],
    Case("attention", "float32", 0, (MAPS, ROWS, HEAD)): [one_op("attention", [HEADS] * 3, HEADS)],
    Case("normalisation", "float32", 0, SQUARE): [one_op("rms_norm", [SQUARE, (HIDDEN,)], SQUARE)],
    Case("pointwise", "float32", 0, (ROWS * HIDDEN,)): [
        one_op("mul", [SQUARE] * 2, SQUARE),
        one_op("add", [SQUARE] * 2, SQUARE),
        one_op("silu", [SQUARE], SQUARE),
    ],
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.kind)
def test_work_is_what_the_cost_model_looks_up(case: Case, direction: Direction) -> None:
    """A curve is of use only if both mean the same by its size: one kernel's FLOPs or bytes."""
    work = []
    for graph in COUNTED[case]:
        kernels = Kernels.of(graph, Precision.preset("fp32"), Runtime.preset("torch"))
        (op,) = graph.ops
        found = getattr(kernels, direction)(op, local_sizes(op, {}))
        assert {kernel.kind for kernel in found} == {case.kind}
        counts_flops = case.kind in ("matmul", "attention")
        work += [kernel.flops if counts_flops else kernel.bytes for kernel in found]
    assert case.work(direction) == pytest.approx(sum(work) / len(work))


# --- what fits the time and the memory -----------------------------------------------------------

KEY: Key = ("matmul", "float32", "forward")


def climbed(*seconds: float) -> _Climb:
    """A climb that has measured products of 1 MFLOP, 2 MFLOP, … in so many seconds."""
    climb = _Climb(clock=None)  # type: ignore[arg-type]  # nothing is measured
    if seconds:
        climb.points[KEY] = [Point(1e6 * (k + 1), s) for k, s in enumerate(seconds)]
    return climb


@given(st.floats(0.1, 100.0), st.integers(1, 100), st.floats(1e-6, 10.0))
def test_time_is_shared_and_never_overspent(left_s: float, remaining: int, last_s: float) -> None:
    cases = [Case("matmul", "float32", 0, (100, 100, 100))]  # 2 MFLOP
    allowed_s = _allowed_s(climbed(last_s), KEY, cases, left_s, 10**9, remaining)
    least_s = 3 * 2 * last_s  # three runs at the last rate
    if least_s > left_s / 5:
        assert allowed_s is None
    else:
        assert allowed_s is not None
        assert allowed_s <= left_s
        assert allowed_s == pytest.approx(max(least_s, left_s / remaining))


def test_what_ends_a_climb() -> None:
    cases = [Case("matmul", "float32", 0, (100, 100, 100))]
    assert _allowed_s(climbed(), KEY, cases, 1.0, 10**9, 10) == pytest.approx(0.1)
    assert _allowed_s(climbed(), KEY, cases, 0.0, 10**9, 10) is None
    assert _allowed_s(climbed(), KEY, cases, 1.0, 4 * cases[0].memory_bytes, 10) is not None
    assert _allowed_s(climbed(), KEY, cases, 1.0, 4 * cases[0].memory_bytes - 1, 10) is None
    ended = climbed()
    ended.ended.add(KEY)
    assert _allowed_s(ended, KEY, cases, 1.0, 10**9, 10) is None


# --- the device ----------------------------------------------------------------------------------

HERE = Machine("some-cpu", 8 * 2**30, 6 * 2**30, 2**28, None)


def roofline(launch_s: float, rate: float, sizes: range) -> list[Point]:
    return [Point(4.0**k, launch_s + 4.0**k / rate) for k in sizes]


def samples(disturbed: float = 1.0) -> Samples:
    points: dict[Key, list[Point]] = {
        ("matmul", "float32", "forward"): roofline(2e-6, 100e9, range(6, 20)),
        ("matmul", "bfloat16", "forward"): roofline(2e-6, 400e9, range(6, 20)),
        ("attention", "float32", "forward"): roofline(5e-6, 50e9, range(8, 18)),
        ("pointwise", "float32", "forward"): roofline(1e-6, 8e9, range(6, 14)),
        ("copy", "float32", "forward"): roofline(1e-6, 10e9, range(6, 14)),
    }
    spoiled = points[KEY][4]
    points[KEY][4] = Point(spoiled.work, spoiled.seconds * disturbed)
    return Samples(points, 7e-6, {})


def test_a_device_is_what_was_measured_on_it(tmp_path: Path) -> None:
    device = device_of(HERE, samples())
    device.save(tmp_path / "device.yaml")
    assert Device.load(tmp_path / "device.yaml") == device
    assert device.peak("float32") == pytest.approx(100e9, rel=0.01)
    assert device.peak("bfloat16") == pytest.approx(400e9, rel=0.01)
    assert device.memory_bandwidth_bytes_per_s == pytest.approx(10e9, rel=0.01)
    assert device.attention_efficiency_fraction == pytest.approx(0.5, rel=0.01)
    assert device.memory_efficiency_fraction == pytest.approx(0.8, rel=0.01)
    assert device.kernel_launch_s == pytest.approx(1e-6, rel=0.5)
    assert device.host_s_per_call == 7e-6
    for (kind, dtype, direction), points in samples().points.items():
        for point in points:
            seconds = device.measured_seconds(kind, dtype, point.work, direction == "backward")
            assert seconds == pytest.approx(point.seconds, rel=1e-3)


def test_one_disturbed_size_does_not_bend_a_curve() -> None:
    clean, bent = device_of(HERE, samples()), device_of(HERE, samples(disturbed=100.0))
    for device in (clean, bent):
        curve = next(c for c in device.curves if (c.kind, c.dtype) == ("matmul", "float32"))
        times = [work / rate for work, rate in zip(curve.work, curve.rate_per_s, strict=True)]
        assert all(b >= a * (1 - 1e-3) for a, b in pairwise(times))
    work = samples().points[KEY][4].work
    truth = clean.measured_seconds("matmul", "float32", work, False)
    found = bent.measured_seconds("matmul", "float32", work, False)
    next_s = samples().points[KEY][5].seconds
    assert truth is not None and found is not None and truth < found <= next_s * (1 + 1e-3)


@pytest.mark.parametrize("lost", ["matmul", "copy"])
def test_a_device_needs_products_and_copies(lost: str) -> None:
    some = samples()
    kept = {key: points for key, points in some.points.items() if key[0] != lost}
    with pytest.raises(InvalidInput, match=f"no {lost} .*could be measured .* raise --budget"):
        device_of(HERE, Samples(kept, some.host_s_per_call, {}))


@pytest.mark.slow
def test_this_machine_is_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "device.yaml"
    run_calibrate(output, budget_s=3.0, dtypes=["float32"], device="cpu", environ={})
    device = Device.load(output)
    assert "float32" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["device.yaml"]
    assert {(c.kind, c.direction) for c in device.curves} == {
        *((kind, way) for kind in KINDS[:-1] for way in ("forward", "backward")),
        ("copy", "forward"),
    }
    assert device.peak("float32") > 1e8
    # A product of 1 GFLOP takes longer than one of 1 MFLOP: the curves hold sizes, not noise.
    small, large = (device.measured_seconds("matmul", "float32", w, False) for w in (1e6, 1e9))
    assert small is not None and large is not None and large > 2 * small


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_s": -1.0}, "--budget is -1, expected seconds above 0"),
        ({"dtypes": ["float23"]}, "--dtypes has 'float23', expected some of float64, float32"),
        ({"dtypes": ["bfloat16"]}, "--dtypes is bfloat16, expected float32 or float64 among"),
        ({"device": "npu"}, "--on npu: expected auto, cpu or cuda"),
        ({"output": "nowhere/device.yaml"}, "folder nowhere does not exist, make it first"),
        ({"output": "."}, "--output .: is a folder, expected a file name"),
        ({"environ": {"WORLD_SIZE": "2"}}, "calibrate: RANK is not set"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput) as raised:
        run_calibrate(**({"environ": {}} | arguments))  # type: ignore[arg-type]
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_curve_that_is_flat_is_noted() -> None:
    key = ("matmul", "float32", "forward")
    honest = [Point(10.0**k, 1e-6 + 10.0**k / 1e9) for k in range(4, 9)]
    held_up = [Point(10.0**k, 8e-3 + 10.0**k / 1e12) for k in range(4, 9)]
    assert implausible(Samples({key: honest}, 1e-6, {})) == ()
    (note,) = implausible(Samples({key: held_up}, 1e-6, {}))
    assert note.startswith("matmul float32 forward takes 8.1 ms whatever its size")
