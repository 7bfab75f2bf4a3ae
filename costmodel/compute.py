"""What a kernel takes on a device: its tiles in waves, its bytes, its launch.

Where the device has measured curves these decide; otherwise class defaults from data sheets. The
roofline model is Williams, Waterman, Patterson (2009), doi:10.1145/1498765.1498785; what a matrix
product loses to tiles and waves is NVIDIA's guide (see `data/matmul.yaml`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from pydantic import BaseModel, ConfigDict

from ..ir.graph import Op, Value
from . import yaml_files
from .device import Device
from .kernels import Kernel, Kernels, Sizes, op_flops
from .precision import Precision
from .runtime import Runtime

__all__ = [
    "backward_seconds",
    "forward_seconds",
    "kernel_seconds",
    "kernels_seconds",
    "op_flops",
    "product_efficiency",
]


class _Tiles(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: tuple[tuple[int, int], ...]
    rate_fractions: tuple[float, ...]
    fill_depth: int
    least_split_depth: int


class _Alignment(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    unaligned_fraction: float


@cache
def _tiles() -> _Tiles:
    return yaml_files.validated(_Tiles, yaml_files.packaged("matmul")["tiles"], "matmul.yaml")


@cache
def _alignment() -> _Alignment:
    data = yaml_files.packaged("matmul")["alignment"]
    return yaml_files.validated(_Alignment, data, "matmul.yaml")


_MATRIX_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


def kernels_seconds(device: Device, kernels: Iterable[Kernel]) -> float:
    """Seconds of kernels one after the other."""
    return sum(kernel_seconds(device, kernel) for kernel in kernels)


def kernel_seconds(device: Device, kernel: Kernel) -> float:
    """Seconds of a kernel (of all its launches): the slower of arithmetic and memory, and a launch.

    A measured curve has its launch in it.
    """
    moves = "copy" if kernel.kind in ("matmul", "attention") else kernel.kind
    count = max(1, kernel.launches)
    moving = device.measured_seconds(moves, kernel.dtype, kernel.bytes / count, kernel.backward)
    if moving is not None:
        moving *= count
    working = None
    if kernel.kind not in ("matmul", "attention"):
        if moving is not None:
            return moving
    else:
        working = device.measured_seconds(kernel.kind, kernel.dtype, kernel.flops, kernel.backward)
    floor = 0.0 if device.curves else kernel.launches * device.kernel_launch_s
    if moving is None:
        rate = device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction
        moving = kernel.bytes / rate
    if working is None:
        working = kernel.flops / _flops_per_s(device, kernel)
    return max(kernel.slower * working, moving) + floor


def _flops_per_s(device: Device, kernel: Kernel) -> float:
    """The rate of a kernel's shape, from class defaults."""
    if kernel.kind == "matmul":
        return _product_rate(device, kernel)
    if kernel.kind == "attention":
        fraction = device.attention_efficiency_fraction
        if kernel.portable:
            fraction = min(fraction, device.portable_attention_fraction or fraction)
        rate = device.peak(kernel.dtype) * fraction
        if device.multiprocessors and kernel.tiles:
            waves = -(-kernel.tiles // device.multiprocessors)
            rate *= kernel.tiles / (waves * device.multiprocessors)
        return rate
    return device.peak("float32") * device.memory_efficiency_fraction


def _product_rate(device: Device, kernel: Kernel) -> float:
    peak, fraction = device.peak(kernel.dtype), device.matmul_efficiency_fraction
    if kernel.product is None or not device.multiprocessors:
        return peak * fraction
    batch, m, n, k = kernel.product
    if _MATRIX_BYTES[kernel.dtype] < 4:
        aligned = _alignment()
        whole = aligned.bytes // _MATRIX_BYTES[kernel.dtype]
        if any(row % whole for row in kernel.rows):
            if batch > 1:
                return device.peak("float32") * fraction
            fraction *= aligned.unaligned_fraction
    return peak * fraction * product_efficiency(batch, m, n, k, device.multiprocessors)


@cache
def product_efficiency(batch: int, m: int, n: int, k: int, multiprocessors: int) -> float:
    """Rate of `batch` products (m x k)·(k x n), of that of one so large that every multiprocessor
    is always busy with the largest tiles: the best of the tile sizes, either way round.

    Lost are what tiles reach beyond the matrix, multiprocessors idle in the last wave, and filling
    the pipeline of loads for every tile.
    """
    tiles = _tiles()
    best = 0.0
    for (rows, columns), rate in zip(tiles.sizes, tiles.rate_fractions, strict=True):
        for tm, tn in {(rows, columns), (columns, rows)}:
            count = batch * -(-m // tm) * -(-n // tn)
            pieces = min(max(1, multiprocessors // count), max(1, k // tiles.least_split_depth))
            depth = -(-k // pieces)
            waves = -(-count * pieces // multiprocessors)
            busy = waves * multiprocessors * tm * tn * (depth + tiles.fill_depth)
            best = max(best, rate * batch * m * n * k / busy)
    return best


def forward_seconds(
    op: Op,
    values: Mapping[str, Value],
    sizes: Sizes,
    device: Device,
    precision: Precision,
    runtime: Runtime | None = None,
) -> float:
    """Seconds of one forward pass of an op on one device. Views cost nothing.

    `values` are the graph's, `sizes` the local factor sizes; the default runtime is `torch`.
    """
    kernels = Kernels(values, precision, runtime or Runtime.preset("torch"))
    return kernels_seconds(device, kernels.forward(op, sizes))


def backward_seconds(
    op: Op,
    values: Mapping[str, Value],
    sizes: Sizes,
    device: Device,
    precision: Precision,
    runtime: Runtime | None = None,
) -> float:
    """Seconds of the backward pass of an op; nothing where no operand has a gradient."""
    kernels = Kernels(values, precision, runtime or Runtime.preset("torch"))
    return kernels_seconds(device, kernels.backward(op, sizes))
