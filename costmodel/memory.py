"""Bytes of a stage: weights, gradients, optimizer state, activations in flight, workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ..ir.errors import InvalidInput
from .liveness import BlockBytes
from .precision import Precision


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
    shards: int,
    trainable: int | None = None,
    gradient_bytes: int | None = None,
) -> StateBytes:
    """Weights, accumulated gradients and AdamW state of one rank.

    `parameters` are the elements this rank computes with (after tensor parallelism), `trainable`
    those with a gradient (default: all), `shards` the ranks that ZeRO splits over: state from
    stage 1, gradients from 2, weights from 3 (arXiv:1910.02054). In bf16: 2 + 4 + 12 bytes per
    parameter; under stage 3 the compute copy is not stored but gathered (`gather_bytes`).
    `gradient_bytes` of an accumulated gradient, where they are not the precision's. Raises
    InvalidInput for another stage or fewer than one shard.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise InvalidInput(f"zero_stage is {zero_stage}, expected 0, 1, 2 or 3")
    if shards < 1:
        raise InvalidInput(f"ZeRO over {shards} ranks: expected at least 1")
    trainable = parameters if trainable is None else trainable

    def share(elements: int, bytes_each: int, from_stage: int) -> int:
        split = shards if zero_stage >= from_stage else 1
        return -(-elements // split) * bytes_each

    if zero_stage == 3 and precision.master_bytes:
        weights = share(parameters - trainable, precision.compute_bytes, 3)
    else:
        weights = share(parameters, precision.compute_bytes, 3)
    return StateBytes(
        weights,
        share(trainable, gradient_bytes or precision.gradient_bytes, 2),
        share(trainable, precision.optimizer_bytes, 1),
    )


def gather_bytes(
    block_parameters: int,
    precision: Precision,
    zero_stage: int,
    shards: int,
    prefetched: int = 1,
    gradient_bytes: int | None = None,
) -> int:
    """Buffers for parameters and gradients of whole blocks under ZeRO, in bytes.

    Stage 3 holds the gathered block it computes and `prefetched` more (FSDP2 prefetches one), and
    from stage 2 on one block's gradient before it is scattered, in the dtype it is reduced in.
    Nothing with a single shard.
    """
    if shards == 1 or zero_stage < 2:
        return 0
    gathered = (1 + prefetched) * precision.compute_bytes if zero_stage == 3 else 0
    return block_parameters * (gathered + (gradient_bytes or precision.gradient_bytes))


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
    and collective library hold: beside the total, as a plan may not use it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    buffers: int
    reserve: int = 0

    @property
    def total(self) -> int:
        """All kinds: what is compared with `memory_limit_bytes`."""
        return sum(self.to_json().values())

    def to_json(self) -> dict[str, int]:
        """By kind, as `Predicted.memory` holds it; adds up to the total."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "reserve"}


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
    `buffers` are there throughout.
    """
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
    )
