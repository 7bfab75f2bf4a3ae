"""What happens once per step, or beside compute: gradient synchronisation, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..ir.errors import InvalidInput
from .cluster import Cluster
from .collectives import Group, collective_seconds
from .device import Device
from .precision import Precision


@dataclass(frozen=True, slots=True)
class SyncSeconds:
    """Data-parallel communication of one stage, in seconds: reductions of gradients and gathers of
    parameters, each per microbatch and once per step."""

    reduce_per_microbatch_s: float = 0.0
    gather_per_microbatch_s: float = 0.0
    reduce_per_step_s: float = 0.0
    gather_per_step_s: float = 0.0

    @property
    def per_microbatch_s(self) -> float:
        return self.reduce_per_microbatch_s + self.gather_per_microbatch_s

    def scaled(self, factor: float) -> SyncSeconds:
        """The same over links that take `factor` times as long."""
        return SyncSeconds(*(factor * getattr(self, each.name) for each in fields(self)))

    @property
    def per_step_s(self) -> float:
        return self.reduce_per_step_s + self.gather_per_step_s


def data_parallel_sync(
    cluster: Cluster,
    group: Group,
    parameters: float,
    precision: Precision,
    zero_stage: int,
    trainable: float | None = None,
    shards: int | None = None,
    gradient_bytes: int | None = None,
) -> SyncSeconds:
    """Gradient reduction and parameter gathering over the data-parallel group.

    `parameters` is the number of elements this rank's stage computes with (after tensor
    parallelism), `trainable` those with a gradient (default: all), `shards` the neighbouring ranks
    of the group that ZeRO splits over (default: all of them; with fewer, what they hold is reduced
    over the others as well: hierarchical ZeRO, arXiv:2312.12705), `gradient_bytes` those of a
    gradient's element (default: the precision's). By ZeRO stage (arXiv:1910.02054; engine as
    FSDP2): 0 all-reduces gradients once; 1 reduce-scatters them and gathers parameters once; 2
    reduce-scatters every microbatch and gathers once; 3 gathers for forward and for backward and
    reduce-scatters, every microbatch. Raises InvalidInput for another stage, or for shards that do
    not divide the group.
    """
    trainable = parameters if trainable is None else trainable
    shards = group.size if shards is None else shards
    if shards < 1 or group.size % shards:
        raise InvalidInput(f"ZeRO over {shards} ranks: expected a divisor of {group.size}")
    inner = Group(shards, group.stride)
    outer = Group(group.size // shards, group.stride * shards)
    each = precision.gradient_bytes if gradient_bytes is None else gradient_bytes

    def gather(elements: float) -> float:
        size = elements * precision.compute_bytes
        return collective_seconds(cluster, "all_gather", size, inner)

    def scatter(elements: float) -> float:
        size = elements * each
        return collective_seconds(cluster, "reduce_scatter", size, inner) + collective_seconds(
            cluster, "all_reduce", size / shards, outer
        )

    match zero_stage:
        case 0:
            whole = collective_seconds(cluster, "all_reduce", trainable * each, group)
            return SyncSeconds(reduce_per_step_s=whole)
        case 1:
            return SyncSeconds(
                reduce_per_step_s=scatter(trainable), gather_per_step_s=gather(trainable)
            )
        case 2:
            return SyncSeconds(
                reduce_per_microbatch_s=scatter(trainable), gather_per_step_s=gather(trainable)
            )
        case 3:
            return SyncSeconds(scatter(trainable), 2 * gather(parameters))
        case _:
            raise InvalidInput(f"zero_stage is {zero_stage}, expected 0, 1, 2 or 3")


def accumulation_seconds(
    device: Device, parameters: float, precision: Precision, gradient_bytes: int | None = None
) -> float:
    """Adding a microbatch's gradients to those of the ones before it.

    Memory-bound: the new gradient (in the compute dtype) and the sum are read, the sum is written.
    """
    each = precision.gradient_bytes if gradient_bytes is None else gradient_bytes
    moved = parameters * (precision.compute_bytes + 2 * each)
    return moved / (device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction)


def optimizer_step_seconds(device: Device, parameters: float, precision: Precision) -> float:
    """AdamW on `parameters` elements (this rank's share: divided by the group under ZeRO >= 1).

    Memory-bound: gradient and moments and master copy are read, moments and master and the compute
    copy are written.
    """
    written_copy = precision.compute_bytes if precision.master_bytes else 0
    moved = parameters * (2 * precision.state_bytes + precision.gradient_bytes + written_copy)
    measured = device.measured_seconds("copy", "float32", moved, False)  # one fused stream
    if measured is not None:
        return measured
    return moved / (device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction)
