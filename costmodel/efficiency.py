"""What one kernel reaches on a device, by its size: measured curves.

A roofline with constant fractions is right for large kernels only. A curve says for a grid of sizes
which rate was reached; `calibrate` measures it on the device at hand.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from math import exp, log
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ComputeDtype = Literal["float64", "float32", "tf32", "bfloat16", "float16", "float8"]
"""What arithmetic is done in. `float32` is full float32; `tf32` is float32 on matrix units."""

KernelClass = Literal["matmul", "attention", "normalisation", "pointwise", "copy"]
"""Kinds of kernels that have a curve of their own."""

Direction = Literal["forward", "backward"]


class EfficiencyCurve(BaseModel):
    """The rate one kernel of a kind reaches, over its size.

    `work` of one kernel, ascending: FLOPs for matmul and attention, bytes read and written for the
    other kinds. `rate_per_s`: FLOP/s or bytes/s reached at each. `direction` says whether the
    kernel is of a forward or of a backward pass; `dtype` is that of its operands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: KernelClass
    dtype: ComputeDtype
    direction: Direction = "forward"
    work: tuple[float, ...] = Field(min_length=1)
    rate_per_s: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_curve(self) -> EfficiencyCurve:
        if len(self.work) != len(self.rate_per_s):
            raise ValueError(
                f"work has {len(self.work)} points and rate_per_s {len(self.rate_per_s)}, "
                "expected as many of each"
            )
        for name, values in (("work", self.work), ("rate_per_s", self.rate_per_s)):
            for value in values:
                if value <= 0:
                    raise ValueError(f"{name} has {value:g}, expected more than 0")
        for left, right in pairwise(self.work):
            if left >= right:
                raise ValueError(f"work has {left:g} before {right:g}, expected ascending")
        return self

    def slowed(self, fraction: float) -> EfficiencyCurve:
        """The curve of a device at that fraction of its arithmetic; memory is as fast."""
        if fraction == 1 or self.kind not in ("matmul", "attention"):
            return self
        return self.model_copy(
            update={"rate_per_s": tuple(fraction * rate for rate in self.rate_per_s)}
        )

    def seconds(self, work: float) -> float:
        """Seconds of one kernel of `work` FLOPs or bytes; nothing where there is no work.

        Between points the logarithm of time is linear in that of work (power laws are exact).
        Beyond the last point the rate stays; before the first the time does, because the smallest
        kernels are bound by their launch.
        """
        if work <= 0:
            return 0.0
        if work <= self.work[0]:
            return self.work[0] / self.rate_per_s[0]
        if work >= self.work[-1]:
            return work / self.rate_per_s[-1]
        right = bisect_right(self.work, work)
        left = right - 1
        low, high = log(self.work[left]), log(self.work[right])
        share = (log(work) - low) / (high - low)
        low_s = low - log(self.rate_per_s[left])
        high_s = high - log(self.rate_per_s[right])
        return exp(low_s + share * (high_s - low_s))
