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
) -> StateBytes:
    """Weights, accumulated gradients and AdamW state of one rank.

    `parameters` are the elements this rank computes with (after tensor parallelism), `trainable`
    those with a gradient (default: all), `shards` the ranks that ZeRO splits over: state from
    stage 1, gradients from 2, weights from 3 (arXiv:1910.02054). In bf16: 2 + 4 + 12 bytes per
    parameter; under stage 3 the compute copy is not stored but gathered (`gather_bytes`). Raises
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
        share(trainable, precision.gradient_bytes, 2),
        share(trainable, precision.optimizer_bytes, 1),
    )


def gather_bytes(
    block_parameters: int, precision: Precision, zero_stage: int, shards: int, prefetched: int = 1
) -> int:
    """Buffers for parameters and gradients of whole blocks under ZeRO, in bytes.

    Stage 3 holds the gathered block it computes and `prefetched` more (FSDP2 prefetches one), and
    from stage 2 on one block's gradient before it is scattered. Nothing with a single shard.
    """
    if shards == 1 or zero_stage < 2:
        return 0
    gathered = (1 + prefetched) * precision.compute_bytes if zero_stage == 3 else 0
    return block_parameters * (gathered + precision.gradient_bytes)


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
    """Peak memory of one rank of a stage by kind, in bytes, without the device's reserve."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.workspace

    def to_json(self) -> dict[str, int]:
        """By kind, as `Predicted.memory` holds it."""
        return {name: getattr(self, name) for name in self.__slots__}


def stage_bytes(
    state: StateBytes, blocks: Sequence[BlockBytes], in_flight: float, gather: int = 0
) -> StageBytes:
    """Adds up a stage.

    `blocks` are its calls of blocks, in order; each keeps its activations for every microbatch in
    flight (of interleaved stages a fraction); the largest workspace of any comes on top, and `gather` of ZeRO.
    """
    return StageBytes(
        state.weights,
        state.gradients,
        state.optimizer,
        ceil(in_flight * sum(block.kept for block in blocks)),
        max((block.workspace for block in blocks), default=0) + gather,
    )
