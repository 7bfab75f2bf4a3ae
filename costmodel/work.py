"""What a stretch of program takes on one rank, by cause."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .compute import kernel_seconds
from .device import Device
from .kernels import Kernel
from .overlap import tensor_exposed_seconds
from .runtime import Runtime

Cause = Literal[
    "matmul",
    "attention",
    "pointwise",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "overhead",
    "offload",
]
"""`pointwise` includes normalisation, lookup and loss; `overhead` is the host's time in excess of
the device's; `offload` what moving activations to host memory takes longer than the passes beside
it."""

COMPUTE: tuple[Cause, ...] = ("matmul", "attention", "pointwise")
"""Causes that keep the device's arithmetic or its memory busy."""

_CAUSE_OF: dict[str, Cause] = {
    "matmul": "matmul",
    "attention": "attention",
    "normalisation": "pointwise",
    "pointwise": "pointwise",
}


_RUNNING_AHEAD = 3
"""Power of the mean of host and device seconds: 1 would add them, a large one takes the longer. At
3 a pass that both need equally takes a quarter more."""


@dataclass(slots=True)
class Work:
    """Seconds of the device by cause, calls that the host makes for it, FLOPs executed, and the
    number of tensor-parallel collectives."""

    seconds: dict[Cause, float] = field(default_factory=dict)
    calls: float = 0.0
    flops: float = 0.0
    collectives: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the device, all causes."""
        return sum(self.seconds.values())

    @property
    def compute_s(self) -> float:
        """Seconds of the device that it computes, communication and waiting for the host aside."""
        return sum(self.seconds.get(cause, 0.0) for cause in COMPUTE)

    def add(self, other: Work, times: float = 1.0) -> None:
        """Adds `times` of another stretch."""
        for cause, seconds in other.seconds.items():
            self.seconds[cause] = self.seconds.get(cause, 0.0) + times * seconds
        self.calls += times * other.calls
        self.flops += times * other.flops
        self.collectives += times * other.collectives

    def scaled(self, cause: Cause, factor: float) -> Work:
        """The same with the seconds of one cause multiplied."""
        if factor == 1.0 or cause not in self.seconds:
            return self
        seconds = {**self.seconds, cause: factor * self.seconds[cause]}
        return Work(seconds, self.calls, self.flops, self.collectives)

    @staticmethod
    def of(device: Device, kernels: Iterable[Kernel], attention: bool = False) -> Work:
        """The work of kernels; all of it counts as attention where they are an attention's."""
        work = Work()
        for kernel in kernels:
            cause: Cause = "attention" if attention else _CAUSE_OF[kernel.kind]
            work.seconds[cause] = work.seconds.get(cause, 0.0) + kernel_seconds(device, kernel)
            work.calls += kernel.launches
            if kernel.kind in ("matmul", "attention"):
                work.flops += kernel.flops
        return work

    @staticmethod
    def communication(cause: Cause, seconds: float, runtime: Runtime) -> Work:
        """The work of one collective's call that takes `seconds`; nothing where it takes none."""
        if seconds <= 0:
            return Work()
        tensor = float(cause == "tensor_parallel")
        total = seconds + runtime.collective_gap_s
        return Work({cause: total}, runtime.calls_per_collective, 0.0, tensor)

    def with_overlap(self, runtime: Runtime) -> Work:
        """The same pass with tensor-parallel collectives hidden as the runtime does it.

        Products and collectives are taken as equal pieces, one of each beside the other.
        """
        pieces = round(self.collectives)
        if runtime.tensor_overlap == "none" or not pieces:
            return self
        exposed = tensor_exposed_seconds(
            runtime.tensor_overlap,
            [self.seconds.get("matmul", 0.0) / pieces] * pieces,
            [self.seconds["tensor_parallel"] / pieces] * pieces,
            runtime.overlap_chunks,
            runtime.collective_gap_s,
        )
        seconds = {**self.seconds, "tensor_parallel": exposed}
        return Work(seconds, self.calls, self.flops, self.collectives)

    def with_host(self, runtime: Runtime, host_s_per_call: float | None = None) -> Work:
        """The same work as it takes when a host has to launch it.

        The host runs ahead, so the longer of the two counts, and a little more where they are
        close, as its lead is used up now and then (`_RUNNING_AHEAD`); where launches block, both.
        `host_s_per_call` is a measured figure that goes before the runtime's.
        """
        each = runtime.host_s_per_call if host_s_per_call is None else host_s_per_call
        host, device = self.calls * each, self.total_s
        if runtime.synchronous_launches:
            excess = host + self.calls * runtime.launch_wait_s
        else:
            excess = (device**_RUNNING_AHEAD + host**_RUNNING_AHEAD) ** (1 / _RUNNING_AHEAD)
            excess -= device
        seconds = {**self.seconds, "overhead": excess}
        return Work(seconds, self.calls, self.flops, self.collectives)
