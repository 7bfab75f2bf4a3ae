"""The distributed optimizer's flat buffers: where each parameter is in `distrib_optim.pt`.

Parameters lie in reverse order of the model, each on a multiple of 64 elements. A bucket is closed
when it holds `bucket_elements`, and is padded to a multiple of the data-parallel size; the file has
the buckets one after the other without this padding (but with that before parameters). An
embedding that is shared with the last stage has a bucket of its own.
Source: megatron.core.distributed.param_and_grad_buffer and distrib_optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
_DIVISOR = 128


@dataclass(frozen=True, slots=True)
class Parameter:
    """Of one rank: `elements` of its shard; `shared` if it is the tied embedding across stages."""

    name: str
    elements: int
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer as the file has it: its elements, and where each parameter starts."""

    elements: int
    begin: dict[str, int]


def buffer_of(parameters: Sequence[Parameter], bucket_elements: int | None = None) -> Buffer:
    """The buffer of a rank's parameters, given in the order of the model.

    `bucket_elements`: None if gradients are not reduced while the backward pass runs; then there
    is one bucket (but for a shared embedding).
    """
    begin: dict[str, int] = {}
    written = 0  # elements of closed buckets
    end = 0  # of the open bucket
    is_open = False
    for one in reversed(parameters):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if one.shared and is_open:
            written += start
            start, is_open = 0, False
        begin[one.name] = written + start
        end = start + one.elements
        is_open = True
        if one.shared or (bucket_elements is not None and end >= bucket_elements):
            written += end
            end, is_open = 0, False
    return Buffer(written + end, begin)
