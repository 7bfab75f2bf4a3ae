"""A device from what was measured on it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from ...ir.errors import InvalidInput
from .. import yaml_files
from ..device import Device
from ..efficiency import EfficiencyCurve
from .machine import Machine
from .measure import Key, Point, Samples

_DIGITS = 4
_LARGE_FRACTION = 1 / 8
"""Copies at least this large against the largest measured are of main memory, not of a cache."""


def device_of(machine: Machine, samples: Samples) -> Device:
    """The device: peaks are the best rates measured, fractions what attention and pointwise ops
    reach of them at their best, curves the rest.

    Raises InvalidInput where products in float32 or float64, or copies, were not measured.
    """
    for kind, dtypes in (("matmul", ("float32", "float64")), ("copy", ())):
        if not any(k == kind and (not dtypes or d in dtypes) for k, d, _ in samples.points):
            raise InvalidInput(
                f"calibrate: no {kind} {'in float32 or float64 ' if dtypes else ''}could be "
                "measured in the time or memory given, expected one at least: raise --budget"
            )
    curves = tuple(_curve(key, points) for key, points in sorted(samples.points.items()))
    peaks = {
        curve.dtype: max(curve.rate_per_s)
        for curve in curves
        if (curve.kind, curve.direction) == ("matmul", "forward")
    }
    copies = next(points for key, points in samples.points.items() if key[0] == "copy")
    bandwidth = max(
        p.work / p.seconds for p in copies if p.work >= copies[-1].work * _LARGE_FRACTION
    )
    launch_s = min(points[0].seconds for points in samples.points.values())
    data = {
        "name": machine.name,
        "memory_bytes": machine.memory_bytes,
        "peak_flops_per_s": {dtype: _short(peak) for dtype, peak in peaks.items()},
        "memory_bandwidth_bytes_per_s": _short(bandwidth),
        # The peak is what products reached: their largest give the fraction.
        "matmul_efficiency_fraction": _fraction(
            curve.rate_per_s[-1] / peaks[curve.dtype]
            for curve in curves
            if (curve.kind, curve.direction) == ("matmul", "forward")
        ),
        "attention_efficiency_fraction": _fraction(
            max(curve.rate_per_s) / peaks[curve.dtype]
            for curve in curves
            if curve.kind == "attention" and curve.dtype in peaks
        ),
        "memory_efficiency_fraction": _fraction(
            curve.rate_per_s[-1] / bandwidth for curve in curves if curve.kind == "pointwise"
        ),
        "kernel_launch_s": _short(launch_s),
        "reserve_bytes": machine.reserve_bytes,
        "host_s_per_call": _short(samples.host_s_per_call),
        "curves": [curve.model_dump() for curve in curves],
    }
    if machine.multiprocessors:
        data["multiprocessors"] = machine.multiprocessors
    return yaml_files.validated(Device, data, "calibrate")


def _curve(key: Key, points: list[Point]) -> EfficiencyCurve:
    """The rates of a curve, such that time never falls with size: a smaller kernel that took
    longer was disturbed, or took what the larger one does."""
    kind, dtype, direction = key
    falling = accumulate((point.seconds for point in reversed(points)), min)
    seconds = list(falling)[::-1]
    return EfficiencyCurve(
        kind=kind,
        dtype=dtype,
        direction=direction,
        work=tuple(_short(point.work) for point in points),
        rate_per_s=tuple(_short(p.work / s) for p, s in zip(points, seconds, strict=True)),
    )


def _fraction(values: Iterable[float]) -> float:
    """The mean, as a fraction of at most 1; 1 where there is no value."""
    found = list(values)
    return min(1.0, _short(sum(found) / len(found))) if found else 1.0


def _short(value: float) -> float:
    """As many digits as a measurement has."""
    return float(f"{value:.{_DIGITS}g}")
