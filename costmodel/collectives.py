"""Seconds of a collective over a group of ranks: measured where it was, a model where it was not.

In this order: the cluster's curve of that collective on that group shape; a curve of it on the
nearest shape across the same levels, or else of a related collective, scaled by what the model says
of both; the model alone, the best of the algorithms in `algorithms` over the cluster's levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import Literal

from ..ir.errors import InvalidInput
from .algorithms import Algorithm, Line, lines
from .cluster import Cluster
from .curves import CollectiveKind, Curve, Reading
from .groups import Group, Hop, hops, pair_at, path_of, shape_of

__all__ = ["Collective", "CollectiveKind", "Group", "collective", "collective_seconds", "hops"]

Source = Literal["measured", "derived", "model"]

_RELATED: dict[CollectiveKind, tuple[CollectiveKind, ...]] = {
    "all_reduce": ("reduce_scatter", "all_gather"),
    "all_gather": ("reduce_scatter", "all_reduce"),
    "reduce_scatter": ("all_gather", "all_reduce"),
    "broadcast": ("all_gather", "all_reduce"),
    "all_to_all": ("all_gather", "reduce_scatter", "all_reduce"),
    "send": (),
}
"""Collectives that move the same bytes over the same links, the closest first."""


@dataclass(frozen=True, slots=True)
class Collective:
    """`seconds` of one collective and where they come from: `measured` on this very group shape,
    `derived` from a measurement of another shape or kind, or the `model` alone. `algorithm` is the
    model's choice; None where the library's own was measured."""

    seconds: float
    source: Source
    algorithm: Algorithm | None = None


def collective_seconds(cluster: Cluster, kind: CollectiveKind, bytes: float, group: Group) -> float:
    """Seconds of one collective over a group, all groups of the axis at once.

    `bytes` is the full logical tensor within the group: the all-gather's output, the
    reduce-scatter's input, the all-reduce's and broadcast's tensor, the all-to-all's total over
    the group (each rank holds bytes / size); for `send` the message. A group of one and an empty
    tensor cost nothing. Raises InvalidInput for a negative size, an unknown kind, or a group that
    does not fit.
    """
    return collective(cluster, kind, bytes, group).seconds


def collective(cluster: Cluster, kind: CollectiveKind, bytes: float, group: Group) -> Collective:
    """As `collective_seconds`, with where the seconds come from."""
    if bytes < 0:
        raise InvalidInput(f"{kind} of {bytes} bytes: expected at least 0")
    known = _known(cluster, kind, group)
    if known is None or bytes == 0:
        return _NOTHING
    if known.reading is not None:
        return Collective(known.reading.at(bytes), known.source)
    seconds, algorithm = min((line.seconds(bytes), line.algorithm) for line in known.model)
    return Collective(seconds, "model", algorithm)


_NOTHING = Collective(0.0, "model")


@dataclass(frozen=True, slots=True)
class _Known:
    """All that does not depend on the size: the algorithms, or a curve in their place."""

    model: tuple[Line, ...]
    source: Source
    reading: Reading | None = None


@lru_cache(maxsize=16384)
def _known(cluster: Cluster, kind: CollectiveKind, group: Group) -> _Known | None:
    path = hops(cluster, group)
    if not path:
        return None
    if kind == "send":
        path = (pair_at(path[-1]),)
    model = _model(cluster, kind, path)
    shape = shape_of(path)
    found = _nearest(cluster, kind, shape)
    if found is None:
        return _Known(model, "model")
    same = found.collective == kind and found.shape == shape
    if same and (found.as_is or not cluster.degraded):
        return _Known(model, "measured", found.reading())
    # Curves are those of a whole cluster, unless this one was probed as it is.
    whole = cluster if found.as_is else cluster.model_copy(update={"degraded": ()})
    there = _model(whole, found.collective, path_of(whole, found.shape))
    scaled = tuple(
        seconds * _best(model, size) / _best(there, size)
        for size, seconds in zip(found.bytes, found.seconds, strict=True)
    )
    return _Known(model, "derived", Reading.of(found.bytes, scaled))


def _nearest(cluster: Cluster, kind: CollectiveKind, shape: tuple[int, ...]) -> Curve | None:
    """The curve that says most about a collective on a shape, across the same levels."""
    order = (kind, *_RELATED[kind])
    fitting = [
        (_apart(curve.shape, shape), order.index(curve.collective), i, curve)
        for i, curve in enumerate(cluster.curves)
        if curve.collective in order and _levels(curve.shape) == _levels(shape)
    ]
    return min(fitting)[-1] if fitting else None


def _levels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i for i, units in enumerate(shape) if units > 1)


def _apart(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    return sum(abs(log(a / b)) for a, b in zip(one, other, strict=True))


def _model(cluster: Cluster, kind: CollectiveKind, path: tuple[Hop, ...]) -> tuple[Line, ...]:
    return lines(kind, path, cluster.worst_levels[0].latency_s)


def _best(model: tuple[Line, ...], bytes: float) -> float:
    return min(line.seconds(bytes) for line in model)
