"""A cluster with one thing about it changed: faster links of a kind, faster or larger devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .cluster import Cluster
from .curves import Curve
from .device import Device, PeakFlops
from .pairs import Pair


def with_level(cluster: Cluster, index: int, factor: float) -> Cluster:
    """Links of level `index` with `factor` times their bandwidth, wherever they are measured or
    described: a matrix of nodes is the outermost level's. What a measured collective takes beyond
    its smallest size is the links'."""
    name, matrix = cluster.levels[index].name, cluster.matrix
    if matrix is not None and index == len(cluster.levels) - 1:
        unit = factor * matrix.unit_bytes_per_s
        matrix = matrix.model_copy(update={"unit_bytes_per_s": unit})
    levels = [
        level.slowed(factor) if i == index else level for i, level in enumerate(cluster.levels)
    ]
    islands = []
    for island in cluster.islands:
        changes = []
        for change in island.levels:
            rates = {
                field: factor * rate
                for field in ("bandwidth_bytes_per_s", "pair_bandwidth_bytes_per_s")
                if (rate := getattr(change, field)) is not None
            }
            changes.append(change.model_copy(update=rates) if change.name == name else change)
        islands.append(island.model_copy(update={"levels": tuple(changes)}))
    curves = [
        _faster(curve, factor) if len(curve.shape) - 1 == index else curve
        for curve in cluster.curves
    ]
    return cluster.model_copy(
        update={
            "levels": tuple(levels),
            "islands": tuple(islands),
            "curves": tuple(curves),
            "matrix": matrix,
        }
    )


def with_pair(cluster: Cluster, index: int, factor: float) -> Cluster:
    """The entry `index` of `pairs` with `factor` times its bandwidth."""
    pairs = list(cluster.pairs)
    pair: Pair = pairs[index]
    rates = {
        field: factor * rate
        for field in ("bandwidth_bytes_per_s", "bandwidth_fraction")
        if (rate := getattr(pair, field)) is not None
    }
    pairs[index] = pair.model_copy(update=rates)
    return cluster.model_copy(update={"pairs": tuple(pairs)})


def with_arithmetic(cluster: Cluster, factor: float) -> Cluster:
    """Devices that compute `factor` times as fast."""

    def faster(device: Device) -> Device:
        peaks = device.peak_flops_per_s.model_dump(exclude_none=True)
        return device.model_copy(
            update={
                "peak_flops_per_s": PeakFlops(**{k: factor * v for k, v in peaks.items()}),
                "curves": tuple(curve.slowed(factor) for curve in device.curves),
            }
        )

    return _every_device(cluster, faster)


def with_memory_bandwidth(cluster: Cluster, factor: float) -> Cluster:
    """Devices whose memory moves `factor` times as many bytes per second."""

    def faster(device: Device) -> Device:
        update: dict[str, Any] = {
            "memory_bandwidth_bytes_per_s": factor * device.memory_bandwidth_bytes_per_s,
            "curves": tuple(
                curve
                if curve.kind in ("matmul", "attention")
                else curve.model_copy(
                    update={"rate_per_s": tuple(factor * rate for rate in curve.rate_per_s)}
                )
                for curve in device.curves
            ),
        }
        return device.model_copy(update=update)

    return _every_device(cluster, faster)


def with_memory(cluster: Cluster, factor: float) -> Cluster:
    """Devices with `factor` times the memory that a plan may use."""

    def larger(device: Device) -> Device:
        usable = int(factor * device.memory_limit_bytes)
        return device.model_copy(update={"memory_bytes": usable + device.reserve_bytes})

    return _every_device(cluster, larger)


def _every_device(cluster: Cluster, changed: Callable[[Device], Device]) -> Cluster:
    islands = [
        island
        if island.device is None
        else island.model_copy(update={"device": changed(island.device)})
        for island in cluster.islands
    ]
    return cluster.model_copy(update={"device": changed(cluster.device), "islands": tuple(islands)})


def _faster(curve: Curve, factor: float) -> Curve:
    least = min(curve.seconds)
    faster = tuple(least + (seconds - least) / factor for seconds in curve.seconds)
    return curve.model_copy(update={"seconds": faster})
