"""What an op takes on one device: a roofline over its FLOPs and the bytes it moves.

FLOPs and bytes follow from the op's factor rule and its line in the op table; classes of work are
in `data/work.yaml`. Sizes are *local* factor sizes: what one rank has (`shards.local_sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..ir.graph import Op, Value
from ..ir.optable import TABLE, Work
from ..ir.rule import FactorName, RuleShape
from . import yaml_files
from .device import ComputeDtype, Device
from .precision import Precision
from .saved import saves

Units = Literal["matmul", "attention", "vector"]
"""Which of the device's efficiencies applies; `vector` work runs on float32 units."""

Sizes = Mapping[FactorName, int]


class WorkClass(BaseModel):
    """How the roofline sees a class of work. Launches are counts of kernels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    peak_fraction: Units
    backward_flops_per_forward_flop: float = Field(ge=0)
    forward_launches: int = Field(ge=0)
    backward_launches: int = Field(ge=0)


@cache
def work_class(work: Work) -> WorkClass:
    """The entry of `data/work.yaml` for a class of the op table."""
    return yaml_files.validated(WorkClass, yaml_files.packaged("work")[work], f"work {work}")


def roofline_seconds(
    device: Device,
    flops: float,
    bytes_moved: float,
    dtype: ComputeDtype,
    kind: Units,
    launches: int = 1,
) -> float:
    """Seconds of `flops` and `bytes_moved`: the slower of arithmetic and memory, plus launches.

    Roofline model: Williams, Waterman, Patterson (2009), doi:10.1145/1498765.1498785.
    """
    if kind == "vector":
        rate = device.peak("float32") * device.memory_efficiency_fraction
    elif kind == "attention":
        rate = device.peak(dtype) * device.attention_efficiency_fraction
    else:
        rate = device.peak(dtype) * device.matmul_efficiency_fraction
    memory_rate = device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction
    return max(flops / rate, bytes_moved / memory_rate) + launches * device.kernel_launch_s


def op_flops(op: Op, sizes: Sizes) -> float:
    """Forward FLOPs of an op over its local loops (a multiply-add counts 2)."""
    line = TABLE[op.kind]
    if line.work == "attention":
        return line.flops * _attention_products(op, sizes)
    return line.flops * prod(sizes[f] for f in op.rule.factors)


def forward_seconds(
    op: Op, values: Mapping[str, Value], sizes: Sizes, device: Device, precision: Precision
) -> float:
    """Seconds of one forward pass of an op on one device. Views cost nothing.

    `values` are the graph's, `sizes` the local factor sizes.
    """
    work = TABLE[op.kind].work
    if work == "view":
        return 0.0
    moved = sum(map(_bytes_of(values, sizes, precision), op.results, op.rule.results))
    if work == "lookup":  # reads the rows it returns, not the whole table
        moved *= 2
    else:
        moved += sum(map(_bytes_of(values, sizes, precision), op.operands, op.rule.operands))
    traits = work_class(work)
    return roofline_seconds(
        device,
        op_flops(op, sizes),
        moved,
        _dtype(op, values, precision),
        traits.peak_fraction,
        traits.forward_launches,
    )


def backward_seconds(
    op: Op, values: Mapping[str, Value], sizes: Sizes, device: Device, precision: Precision
) -> float:
    """Seconds of the backward pass of an op; nothing where no operand has a gradient.

    A contraction does one product per operand with a gradient (twice the forward pass for two),
    attention 2.5 times the forward pass. Bytes: gradients of the results (once per product) and
    what was saved are read, gradients of the operands written.
    """
    work = TABLE[op.kind].work
    wanted = [k for k, name in enumerate(op.operands) if values[name].grad]
    if work == "view" or not wanted or not any(values[r].grad for r in op.results):
        return 0.0
    products = len(wanted) if work == "contraction" else 1
    size_of = _bytes_of(values, sizes, precision)
    kept = saves(op, values)
    moved = products * sum(map(size_of, op.results, op.rule.results))
    moved += sum(size_of(op.operands[k], op.rule.operands[k]) for k in (*wanted, *kept.operands))
    moved += sum(size_of(op.results[k], op.rule.results[k]) for k in kept.results)
    traits = work_class(work)
    ratio = traits.backward_flops_per_forward_flop * products
    return roofline_seconds(
        device,
        ratio * op_flops(op, sizes),
        moved,
        _dtype(op, values, precision),
        traits.peak_fraction,
        products if work == "contraction" else traits.backward_launches,
    )


def _bytes_of(
    values: Mapping[str, Value], sizes: Sizes, precision: Precision
) -> Callable[[str, RuleShape], int]:
    def size_of(name: str, shape: RuleShape) -> int:
        elements = prod(sizes[f] for dim in shape for f in dim)
        return elements * precision.element_bytes(values[name].dtype)

    return size_of


def _dtype(op: Op, values: Mapping[str, Value], precision: Precision) -> ComputeDtype:
    """The dtype of the arithmetic: the recipe's, but float32 at least where an operand is wide."""
    wide = any(values[name].dtype in ("wide", "float32") for name in op.operands)
    return "float32" if wide and precision.compute_bytes < 4 else precision.compute_dtype


def _attention_products(op: Op, sizes: Sizes) -> float:
    """Multiply-adds of `q·kᵀ` and `p·v`: heads x (query, key) pairs that attend x (d + e).

    Causal attention has half of the pairs; a window of w keys w of t, less its ramp.
    """
    query, key, value = op.rule.operands[:3]

    def size(shape: RuleShape, dim: int) -> int:
        return prod(sizes[f] for f in shape[dim])

    batch, heads, queries, keys = size(query, 0), size(query, 1), size(query, 2), size(key, 2)
    causal, window = op.attributes.get("causal", False), op.attributes.get("window")
    seen = keys if window is None else min(window, keys)
    share = seen * (1 - seen / (2 * keys)) if causal else seen
    return batch * heads * queries * share * (size(query, 3) + size(value, 3))
