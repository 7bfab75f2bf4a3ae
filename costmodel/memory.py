"""Bytes of a stage: weights, gradients, optimizer state, activations in flight, workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..ir.errors import InvalidInput
from .liveness import BlockBytes
from .precision import Precision
from .zero import ZeroShards


@dataclass(frozen=True, slots=True)
class StateBytes:
    """What a rank stores between microbatches, in bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )


def state_bytes(
    parameters: int,
    precision: Precision,
    zero_stage: int,
    shards: int | ZeroShards,
    trainable: int | None = None,
    gradient_bytes: int | None = None,
) -> StateBytes:
    """Weights, accumulated gradients and AdamW state of one rank.

    `parameters` are the elements this rank computes with (after tensor parallelism), `trainable`
    those with a gradient (default: all), `shards` the ranks that ZeRO splits over, of each state
    where they differ: state from stage 1, gradients from 2, weights from 3 (arXiv:1910.02054). In
    bf16: 2 + 4 + 12 bytes per parameter; under stage 3 the compute copy is not stored but gathered
    from the master copy (`gather_bytes`), unless that is split over more ranks than parameters are
    gathered from: these then hold a copy in the compute dtype, ZeRO++'s secondary partition
    (arXiv:2306.10209, section 3.2). `gradient_bytes` of an accumulated gradient, where they are not
    the precision's. Raises InvalidInput for another stage, fewer than one shard, or groups that are
    not nested.
    """
    split = ZeroShards.of(shards).split(zero_stage)
    trainable = parameters if trainable is None else trainable

    def share(elements: int, bytes_each: int, over: int) -> int:
        return -(-elements // over) * bytes_each

    stored = parameters
    if zero_stage == 3 and precision.master_bytes and split.uniform:
        stored -= trainable
    return StateBytes(
        share(stored, precision.compute_bytes, split.parameters),
        share(trainable, gradient_bytes or precision.gradient_bytes, split.gradients),
        share(trainable, precision.optimizer_bytes, split.optimizer),
    )


def gather_bytes(
    block_parameters: int,
    precision: Precision,
    zero_stage: int,
    shards: int | ZeroShards,
    prefetched: int = 1,
    gradient_bytes: int | None = None,
) -> int:
    """Buffers for parameters and gradients of whole blocks under ZeRO, in bytes.

    Stage 3 holds the gathered block it computes and `prefetched` more (FSDP2 prefetches one), and
    from stage 2 on one block's gradient before it is scattered, in the dtype it is reduced in.
    Nothing of a state with a single shard.
    """
    split = ZeroShards.of(shards).split(zero_stage)
    gathered = (1 + prefetched) * precision.compute_bytes if split.parameters > 1 else 0
    scattered = (gradient_bytes or precision.gradient_bytes) if split.gradients > 1 else 0
    return block_parameters * (gathered + scattered)


_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size and allgather_bucket_size (runtime/zero/config.py)."""


def flat_buffer_bytes(
    parameters: int, precision: Precision, accumulated_bytes: int, zero_stage: int, shards: int
) -> int:
    """What DeepSpeed's optimizers hold beside ZeRO's state, in bytes: single allocations as large
    as all parameters (or a rank's shard), which no freed activation makes room for.

    With gradients accumulated wider than they are made (`accumulated_bytes`, BF16_Optimizer): those
    of the microbatch, all at once, and the list that all-gather collects updated weights in. Else
    (FP16, from stage 1 on): of the rank's shard a flat copy of the gradients, one in float32, and a
    bucket; without ZeRO float32 copies of all gradients and their concatenation.
    """
    compute = precision.compute_bytes
    if accumulated_bytes > compute and zero_stage < 2:
        return parameters * (compute + (compute if shards > 1 else 0))
    if zero_stage == 0:
        return parameters * 2 * precision.gradient_bytes
    own = -(-parameters // shards) * (compute + precision.gradient_bytes)
    return own + min(parameters, _BUCKET_ELEMENTS) * compute * (shards > 1)


BUFFERED_BLOCKS = 2
"""On the device while others are in a tier: the block in use, and the one that travels."""


def activation_buffers(held_bytes: int, largest_bytes: int) -> int:
    """Bytes on the device for activations of which `held_bytes` are in a tier: of the blocks that
    are there at a time, of `largest_bytes` each, or all where that is less."""
    return min(held_bytes, BUFFERED_BLOCKS * largest_bytes)


def in_flight_microbatches(stages: int, stage: int, microbatches: int) -> int:
    """Microbatches whose activations a stage holds at once under 1F1B: min(m, p - s).

    Narayanan et al. 2021, arXiv:2104.04473. Raises InvalidInput for a stage that is not there.
    """
    if not 0 <= stage < stages or microbatches < 1:
        raise InvalidInput(
            f"stage {stage} of {stages} with {microbatches} microbatches: expected 0 <= stage < "
            "stages and at least one microbatch"
        )
    return min(microbatches, stages - stage)


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Peak memory of one rank of a stage by kind, in bytes.

    `activations` of microbatches in flight, without the `logits` that a loss keeps; `workspace` on
    top of them at the worst moment of a pass, with converted copies; `buffers`: gathered and
    prefetched parameters, gradients on their way, flat copies. `reserve` is what driver, framework
    and collective library hold: beside the total, as a plan may not use it. `host`: activations
    that wait in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    buffers: int
    reserve: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """All kinds: what is compared with `memory_limit_bytes`."""
        return sum(self.to_json().values())

    def to_json(self) -> dict[str, int]:
        """By kind, as `Predicted.memory` holds it; adds up to the total."""
        beside = ("reserve", "host")
        return {name: getattr(self, name) for name in self.__slots__ if name not in beside}


def stage_bytes(
    state: StateBytes,
    blocks: Sequence[BlockBytes],
    in_flight: float,
    buffers: int = 0,
    outputs: int = 0,
    reserve: int = 0,
) -> StageBytes:
    """Adds up a stage.

    `blocks` are its calls of blocks, in order; each keeps its activations for every microbatch in
    flight (of interleaved stages a fraction), as are `outputs` that a stage holds until the
    backward pass. The backward pass goes from the last block to the first and frees as it goes, so
    that the workspace of a block comes on top of what blocks up to it keep of this microbatch.
    `buffers` are there throughout, and with them those of activations that are offloaded.
    """
    host = ceil(in_flight * sum(block.offloaded for block in blocks))
    buffers += activation_buffers(host, max((block.offloaded for block in blocks), default=0))
    logits = ceil(in_flight * sum(block.logits for block in blocks))
    kept = ceil(in_flight * (outputs + sum(block.kept for block in blocks)))
    later, workspace = 0, 0  # of the last microbatch: what blocks after this one have freed
    for block in reversed(blocks):
        workspace = max(workspace, block.workspace - later)
        later += block.kept
    return StageBytes(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=kept - logits,
        logits=logits,
        workspace=workspace,
        buffers=buffers,
        reserve=reserve,
        host=host,
    )
