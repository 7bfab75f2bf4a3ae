"""What happens once per step, or beside compute: gradient synchronisation, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..ir.errors import InvalidInput
from .cluster import Cluster
from .collectives import CollectiveKind, Group, collective_seconds
from .device import Device
from .precision import Precision
from .zero import ZeroShards


@dataclass(frozen=True, slots=True)
class SyncSeconds:
    """Data-parallel communication of one stage, in seconds: reductions of gradients and gathers of
    parameters, each per microbatch and once per step; `outer_s` averages parameters once in several
    steps."""

    reduce_per_microbatch_s: float = 0.0
    gather_per_microbatch_s: float = 0.0
    reduce_per_step_s: float = 0.0
    gather_per_step_s: float = 0.0
    outer_s: float = 0.0

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
    shards: int | ZeroShards | None = None,
    gradient_bytes: int | None = None,
) -> SyncSeconds:
    """Gradient reduction and parameter gathering over the data-parallel group.

    `parameters` is the number of elements this rank's stage computes with (after tensor
    parallelism), `trainable` those with a gradient (default: all), `shards` the neighbouring ranks
    of the group that ZeRO splits over, of each state where they differ (default: all of them),
    `gradient_bytes` those of a gradient's element (default: the precision's).

    By ZeRO stage (arXiv:1910.02054; engine as FSDP2): 0 all-reduces gradients once; 1
    reduce-scatters them and gathers parameters once; 2 reduce-scatters every microbatch and gathers
    once; 3 gathers for forward and for backward and reduce-scatters, every microbatch. With all
    state on a part of the group, what its ranks hold is reduced over the others as well, each time
    (hybrid sharding as FSDP2 has it; hierarchical ZeRO, arXiv:2312.12705).

    With a group for each state, P parameters split over p ranks, gradients over g, optimizer state
    over o of N (1 where the stage does not split them): gathers of P over p, twice a microbatch;
    gradients reduce-scattered over g every microbatch. Once a step what is left goes across groups
    (MiCS's two hops, arXiv:2205.00119, section 3.4): P/g is reduce-scattered over the o/g groups
    and P/o all-reduced over the N/o others, and the updated P/o are gathered to the P/p of the o/p
    ranks that hold the same parameters (the refresh of ZeRO++'s secondary partition,
    arXiv:2306.10209, section 3.2).

    Raises InvalidInput for another stage, for shards that do not divide the group, or groups that
    are not nested.
    """
    trainable = parameters if trainable is None else trainable
    groups = ZeroShards.of(group.size if shards is None else shards)
    split = groups.split(zero_stage)
    if group.size % groups.optimizer:
        raise InvalidInput(f"ZeRO over {groups.text} ranks: expected a divisor of {group.size}")
    each = precision.gradient_bytes if gradient_bytes is None else gradient_bytes

    def over(kind: CollectiveKind, size: float, ranks: int, inside: int) -> float:
        """A collective over `ranks` ranks, neighbours but for `inside` of a group that ends
        there."""
        return collective_seconds(cluster, kind, size, Group(ranks, group.stride * inside))

    gather = over("all_gather", parameters * precision.compute_bytes, split.parameters, 1)
    scatter = over("reduce_scatter", trainable * each, split.gradients, 1)
    across = over(
        "reduce_scatter", trainable * each / split.gradients,
        split.optimizer // split.gradients, split.gradients,
    )  # fmt: skip
    rest = over(
        "all_reduce", trainable * each / split.optimizer,
        group.size // split.optimizer, split.optimizer,
    )  # fmt: skip
    refresh = over(
        "all_gather", trainable * precision.compute_bytes / split.parameters,
        split.optimizer // split.parameters, split.parameters,
    )  # fmt: skip
    alike = split.uniform if zero_stage == 3 else split.gradients == split.optimizer
    at_once = zero_stage >= 2 and alike
    return SyncSeconds(
        reduce_per_microbatch_s=scatter + rest * at_once,
        gather_per_microbatch_s=2 * gather,
        reduce_per_step_s=across + rest * (not at_once),
        gather_per_step_s=refresh,
    )


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
