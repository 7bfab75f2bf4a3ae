"""Seconds of one call on the CPU or in a CUDA stream: warmed up, repeated, the median."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCKS = 15
_ALONE_BLOCK_S = 1e-3
_SHARED_BLOCK_S = 20e-3
"""Where ranks share cores, a block of calls must span several turns of the scheduler (a few
milliseconds each), or its median is the time of a call that was never interrupted."""
_MOST_CALLS = 500
_SLEEP_CYCLES_PER_S = 2.0e9
"""About a GPU's clock: how long a spinning kernel lasts only has to exceed what calls take to
queue."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Times calls on a device. `shared`: several ranks run on the same cores."""

    device: torch.device
    shared: bool = False

    def seconds(self, call: Callable[[], object], at_most_s: float) -> float:
        """Seconds of one call, from blocks of calls that take `at_most_s` together (one block at
        least)."""
        call()
        self._finish()
        before = time.perf_counter()
        call()
        self._finish()
        once_s = max(time.perf_counter() - before, 1e-7)
        block_s = _SHARED_BLOCK_S if self.shared else _ALONE_BLOCK_S
        calls = max(1, min(_MOST_CALLS, round(block_s / once_s)))
        taken = []
        began = time.perf_counter()
        while True:
            taken.append(self._block(call, calls, once_s))
            over = time.perf_counter() - began + calls * taken[-1] > at_most_s
            # Ranks that share cores all go on for as long: none runs alone at the end.
            if over or (not self.shared and len(taken) == _BLOCKS):
                return median(taken)

    def _block(self, call: Callable[[], object], calls: int, once_s: float) -> float:
        if self.device.type != "cuda":
            before = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - before) / calls
        import torch

        # The calls are queued behind a kernel that spins, so that the host's time to queue them is
        # not in the device's.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(_SLEEP_CYCLES_PER_S * min(calls * once_s, 0.1)))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        self._finish()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def host_seconds(self, call: Callable[[], object], times: int) -> float:
        """Seconds the host takes for one call, whether or not the device has finished it."""
        call()
        taken = []
        for _ in range(times):
            self._finish()
            before = time.perf_counter()
            call()
            taken.append(time.perf_counter() - before)
        self._finish()
        return median(taken)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
