"""Moving state out of a device: what it saves there, and how long the moves take.

The tiers of ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857): host memory behind the
device's link, and NVMe behind both. What moves is a rank's own part, so that all links of a job
work at once. Seconds are those of the transfers alone; what of them hides behind compute is for the
caller to say, who knows what runs beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..ir.errors import InvalidInput
from .device import Device
from .memory import BUFFERED_BLOCKS, StateBytes, activation_buffers
from .precision import Precision

Tier = Literal["host", "nvme"]


@dataclass(frozen=True, slots=True)
class Offload:
    """One kind of state moved to a tier, per rank and step.

    `saved_bytes` of the device (what stays as buffers is taken off), `tier_bytes` needed in the
    tier, seconds of transfers to and from the device, which a link carries at the same time.
    """

    tier: Tier
    saved_bytes: int
    tier_bytes: int
    to_device_s: float
    from_device_s: float

    @property
    def seconds(self) -> float:
        """Of both directions, side by side."""
        return max(self.to_device_s, self.from_device_s)


def offload_optimizer(
    device: Device,
    state: StateBytes,
    precision: Precision,
    shard_parameters: int,
    tier: Tier = "host",
) -> Offload:
    """Optimizer state in a tier, updated there.

    `shard_parameters` are those that this rank updates. Gradients go down in the dtype they are
    accumulated in, updated weights come up in the one that is computed in; state on NVMe goes
    through host memory in both directions (section 6.2 of the paper). Raises InvalidInput where the
    device has no such tier, or too little of it.
    """
    down = shard_parameters * precision.gradient_bytes
    up = shard_parameters * precision.compute_bytes
    link = _link(device)
    if tier == "host":
        moved = (up / link, down / link)
    else:  # read and written once, beside what the link carries
        disk = state.optimizer / _nvme(device)
        moved = (max(up / link, disk), max(down / link, disk))
    return _offload(device, tier, state.optimizer, state.optimizer, *moved)


def offload_parameters(
    device: Device, weight_bytes: int, largest_bytes: int, passes: float, tier: Tier = "host"
) -> Offload:
    """Weights in a tier, brought up for each pass.

    `weight_bytes` of this rank's part, `largest_bytes` of the largest block's part, `passes` over
    the model in a step: two for every microbatch, three where a block runs again. They never go
    down: the update is where they are. Raises InvalidInput as `offload_optimizer` does.
    """
    saved = max(0, weight_bytes - BUFFERED_BLOCKS * largest_bytes)
    up = passes * weight_bytes / _rate(device, tier)
    return _offload(device, tier, saved, weight_bytes, up, 0.0)


def offload_activations(
    device: Device,
    kept_bytes: int,
    largest_bytes: int,
    in_flight: float,
    microbatches: int,
    tier: Tier = "host",
) -> Offload:
    """What blocks keep for the backward pass in a tier: down after forward, up before backward.

    `kept_bytes` of a rank for one microbatch, `largest_bytes` of one block, `in_flight` and
    `microbatches` of a step. Raises InvalidInput as `offload_optimizer` does.
    """
    held = int(in_flight * kept_bytes)
    once = microbatches * kept_bytes / _rate(device, tier)
    saved = held - activation_buffers(held, largest_bytes)
    return _offload(device, tier, saved, held, once, once)


def can_offload(device: Device) -> bool:
    """Whether a device says what it takes to move activations to host memory."""
    return device.host_link_bytes_per_s is not None and device.host_memory_bytes is not None


def activations_exposed_seconds(device: Device, kept_bytes: int, pass_s: float) -> float:
    """What moving a block's activations adds to a pass of `pass_s` seconds over it.

    Down while the next block's forward pass runs, up while the one after it goes backward
    (ZeRO-Infinity, section 6.2; vDNN, arXiv:1602.08124); blocks are alike, so what takes longer
    than a pass over the block itself sticks out. The device's copy engines move it, which slows no
    kernel. Raises InvalidInput where the device has no link to host memory.
    """
    return max(0.0, kept_bytes / _link(device) - pass_s)


def _offload(
    device: Device, tier: Tier, saved: int, needed: int, to_device_s: float, from_device_s: float
) -> Offload:
    name = "host_memory_bytes" if tier == "host" else "nvme_bytes"
    room = _known(device, name)
    if needed > room:
        raise InvalidInput(
            f"device {device.name}: {name} is {room:.0f}, but {needed} bytes are to go there; "
            "move less, or give the device a larger tier"
        )
    return Offload(tier, saved, needed, to_device_s, from_device_s)


def _rate(device: Device, tier: Tier) -> float:
    return _link(device) if tier == "host" else min(_link(device), _nvme(device))


def _link(device: Device) -> float:
    return _known(device, "host_link_bytes_per_s")


def _nvme(device: Device) -> float:
    return _known(device, "nvme_bytes_per_s")


def _known(device: Device, name: str) -> float:
    value: float | None = getattr(device, name)
    if value is None:
        raise InvalidInput(
            f"device {device.name}: {name} is not given, expected a number for offloading; "
            "add it to the device file"
        )
    return value
