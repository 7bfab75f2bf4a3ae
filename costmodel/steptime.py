"""The time of a training step under 1F1B, in closed form, and what happens once per step.

Stages `s = 0 … p-1` take `T_s` seconds (forward and backward) per microbatch; passing an activation
from stage `s` to `s+1` takes `c_s`, and so does its gradient on the way back; `m` microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.errors import InvalidInput
from . import yaml_files
from .cluster import Cluster
from .collectives import Group, collective_seconds
from .device import Device
from .precision import Precision

FORWARD_SHARE = 1 / 3
"""Forward's part of a microbatch's time: a contraction's backward pass is two products of three."""


def pipeline_bound_seconds(
    stage_s: Sequence[float], p2p_s: Sequence[float], microbatches: int
) -> float:
    """No synchronous schedule is faster: max over s of `m·T_s + Σ_{i<s} (T_i + 2·c_i)`.

    Stage s works m·T_s; before its first forward an activation has passed every stage before it,
    and after its last backward a gradient passes them again. Reached by 1F1B for equal stages
    without p2p. `stage_s` and `p2p_s` in seconds, one p2p fewer than stages. Raises InvalidInput
    where lengths or counts do not fit.
    """
    _check(stage_s, p2p_s, microbatches)
    best = passed = 0.0
    for s, seconds in enumerate(stage_s):
        best = max(best, microbatches * seconds + passed)
        if s < len(p2p_s):
            passed += seconds + 2 * p2p_s[s]
    return best


def pipeline_estimate_seconds(
    stage_s: Sequence[float],
    p2p_s: Sequence[float],
    microbatches: int,
    forward_share: float = FORWARD_SHARE,
) -> float:
    """What non-interleaved 1F1B takes, nearly; never below the bound.

    The longest of two chains through each stage s, after Σ_{i<s} (T_i + 2·c_i) to reach and leave
    it. *Busy*: m·T_s, and the waits for the way behind it, `D = Σ_{i>s} T_i + 2·Σ_{i>=s} c_i`:
    at the start with w = p-1-s forwards to fill it, at the end with as many backwards. *Round
    trips*: with p-s microbatches in flight, every (p-s)-th waits for a gradient to come back.
    Equal stages without p2p: exactly `(m + p - 1)·T` (Narayanan et al. 2021, arXiv:2104.04473,
    section 2.2). Against simulation, 20,000 random pipelines each: exact for stages within ±20 %
    without p2p; at most 8 % low with p2p up to 10 % of a stage. Arguments and errors as
    `pipeline_bound_seconds`; `forward_share` is the forward's part of T.
    """
    _check(stage_s, p2p_s, microbatches)
    count = len(stage_s)
    reached = [0.0]
    for seconds, transfer in zip(stage_s, p2p_s, strict=False):
        reached.append(reached[-1] + seconds + 2 * transfer)
    longest = behind = 0.0
    for s in reversed(range(count)):
        forward = forward_share * stage_s[s]
        backward = stage_s[s] - forward
        ahead = count - 1 - s
        behind += 2 * p2p_s[s] if ahead else 0.0
        waits = max(0.0, behind - min(microbatches - 1, ahead) * forward)
        if microbatches > ahead + 1:
            waits += max(0.0, behind - ahead * backward)
        busy = microbatches * stage_s[s] + (waits if ahead else 0.0)
        trips, rest = divmod(microbatches - 1, count - s)
        round_trips = (trips + 1) * (stage_s[s] + behind) + rest * backward
        longest = max(longest, reached[s] + max(busy, round_trips))
        behind += stage_s[s]
    return longest


def _check(stage_s: Sequence[float], p2p_s: Sequence[float], microbatches: int) -> None:
    if not stage_s or len(p2p_s) != len(stage_s) - 1:
        raise InvalidInput(
            f"pipeline of {len(stage_s)} stages with {len(p2p_s)} transfers between them: expected "
            "one transfer fewer than stages"
        )
    if microbatches < 1:
        raise InvalidInput(f"{microbatches} microbatches: expected at least 1")


def overlap_cost_fraction() -> float:
    """Seconds that a second of communication costs the compute it is hidden behind.

    While a collective runs, compute takes `1 + slowdown` as long, so in each second of it
    `slowdown / (1 + slowdown)` of a second is lost. The slowdown and its source are in
    `data/overlap.yaml`.
    """
    slowdown = float(yaml_files.packaged("overlap")["compute"]["slowdown_fraction"])
    return slowdown / (1 + slowdown)


def exposed_seconds(communication_s: float, compute_s: float) -> float:
    """What communication adds to the compute that it runs beside: the loss while it is hidden, and
    what is left of it when the compute is done."""
    loss = overlap_cost_fraction()
    hidden = min(communication_s, compute_s / (1 - loss))
    return loss * hidden + communication_s - hidden


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
    state = precision.optimizer_bytes + (0 if precision.master_bytes else precision.compute_bytes)
    written_copy = precision.compute_bytes if precision.master_bytes else 0
    moved = parameters * (2 * state + precision.gradient_bytes + written_copy)
    rate = device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction
    return moved / rate
