"""The α–β line of a link: latency and bandwidth from seconds at several sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Line:
    """`latency_s` + bytes / `bandwidth_bytes_per_s`."""

    latency_s: float
    bandwidth_bytes_per_s: float

    def seconds(self, bytes: float) -> float:
        """What a message of that size takes."""
        return self.latency_s + bytes / self.bandwidth_bytes_per_s


def fitted_line(bytes: ArrayLike, seconds: ArrayLike) -> Line:
    """The line of least squared *relative* error, so that small messages count as much as large.

    Neither term is negative: where the best line would have a negative one, the best line without
    it is taken (of two terms that is the non-negative least squares solution). Needs one size at
    least; of a single size all is bandwidth. A link that is no slower for more bytes gets its
    bandwidth from its largest message.
    """
    sizes, times = np.asarray(bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(sizes) > 1:
        terms = np.stack([1 / times, sizes / times], axis=1)
        (latency_s, per_byte_s), *_ = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)
        if per_byte_s > 0 and latency_s >= 0:
            return Line(float(latency_s), float(1 / per_byte_s))
        if per_byte_s <= 0:
            latency_s = float((1 / times).sum() / (1 / times**2).sum())
            return Line(latency_s, float(sizes[-1] / times[-1]))
    ratio = sizes / times
    return Line(0.0, float((ratio**2).sum() / ratio.sum()))
