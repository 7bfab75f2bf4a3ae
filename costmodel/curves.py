"""Measured collectives: one curve of seconds over bytes per kind and group shape, and its reading.

A shape says how a group lies on the levels of a cluster: for each level, innermost first, how many
units of the level inside it one unit of this level has of the group. `(8,)` is eight devices of a
node, `(8, 4)` four whole nodes of eight, `(1, 4)` one device on each of four nodes; the product is
the size of the group. Levels that a group does not cross are 1, and trailing ones are left out.

Between two measured sizes time is a straight line: exact where one algorithm and protocol serves
both, whose time is a latency and a bandwidth, and between the two times in any case. On published
curves this errs less than a line between logarithms (`benchmarks/collective_curves.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from .yaml_files import Misfit

CollectiveKind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"
]


class Curve(BaseModel):
    """A collective measured on one group shape, at one or more sizes.

    `bytes` are ascending sizes of the full logical tensor, as `collective_seconds` defines them;
    `seconds` the time measured at each. `source` says where the figures come from, `as_is`
    that they were measured on the very cluster they stand in, slow nodes included. A `send`
    measured between two devices has a shape of ones and a last 2: `(2,)` inside the innermost
    level, `(1, 2)` across the next.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    collective: CollectiveKind
    shape: tuple[int, ...]
    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    source: str = ""
    as_is: bool = False

    @field_validator("shape")
    @classmethod
    def _shape_of_a_group(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(units < 1 for units in value) or prod(value) < 2:
            raise Misfit(
                f"is {list(value)}, expected units per level, each at least 1, of 2 or more devices"
            )
        while value[-1] == 1:
            value = value[:-1]
        return value

    @field_validator("bytes")
    @classmethod
    def _bytes_ascend(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or value[0] <= 0:
            raise Misfit(f"is {list(value)}, expected one or more sizes above 0")
        for i, (a, b) in enumerate(pairwise(value)):
            if a >= b:
                raise Misfit(
                    f"is {b:g} after {a:g}, expected ascending sizes without repeats "
                    "(give the median of repeated measurements)",
                    i + 1,
                )
        return value

    @field_validator("seconds")
    @classmethod
    def _seconds_positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for i, seconds in enumerate(value):
            if seconds <= 0:
                raise Misfit(f"is {seconds:g}, expected seconds above 0", i)
        return value

    @model_validator(mode="after")
    def _one_time_per_size(self) -> Curve:
        if len(self.bytes) != len(self.seconds):
            raise Misfit(
                f"has {len(self.seconds)} entries and bytes {len(self.bytes)}, expected as many",
                "seconds",
            )
        return self

    @property
    def size(self) -> int:
        """Number of devices in the group."""
        return prod(self.shape)

    def reading(self) -> Reading:
        """The curve between, below and above its sizes."""
        return Reading.of(self.bytes, self.seconds)


@dataclass(frozen=True, slots=True)
class Reading:
    """A curve that can be read at any size, never falling with it.

    A time above that of a larger size is lowered to it: a small message could be padded to the
    larger one, and what disturbs a measurement only adds time (first calls of a process, above
    all). Below the smallest size the first line goes on, to no less than a latency of nothing;
    where the curve is flat there that is constant time. Above the largest the bandwidth reached
    there stays.
    """

    bytes: tuple[float, ...]
    seconds: tuple[float, ...]
    below_s_per_byte: float

    @staticmethod
    def of(bytes: tuple[float, ...], seconds: tuple[float, ...]) -> Reading:
        """Of ascending sizes and the seconds of each; a single size is taken for a latency."""
        rising = tuple(reversed(tuple(accumulate(reversed(seconds), min))))
        below = 0.0
        if len(bytes) > 1:
            below = min((rising[1] - rising[0]) / (bytes[1] - bytes[0]), rising[0] / bytes[0])
        return Reading(bytes, rising, below)

    def at(self, bytes: float) -> float:
        """Seconds at a size of 0 or more bytes."""
        i = bisect_right(self.bytes, bytes)
        if i == 0:
            return self.seconds[0] - self.below_s_per_byte * (self.bytes[0] - bytes)
        if i == len(self.bytes):
            return self.seconds[-1] * (bytes / self.bytes[-1])
        share = (bytes - self.bytes[i - 1]) / (self.bytes[i] - self.bytes[i - 1])
        return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])
