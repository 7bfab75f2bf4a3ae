"""Levels: the kinds of links of a cluster, from the GPUs of a node out to all of its nodes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .fabric import Fabric
from .torus import Torus

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Level(BaseModel):
    """Links of one level.

    `bandwidth_bytes_per_s` is what *one device* can send to the rest of the level, one direction,
    nominal: on the NIC level the device's share of its node's NICs. `achieved_fraction` of it is
    what large messages reach. `pair_bandwidth_bytes_per_s` is the nominal limit between two
    devices where links are point to point rather than switched. `latency_s` is the cost of one
    step of a collective. `span_devices` is the number of devices joined. `fabric` says how flows
    find their way where a level has more than one switch; it slows collectives, not a single link.
    `torus` says that each device has links to its neighbours only, `bandwidth_bytes_per_s` being
    that of all of them together and `latency_s` that of one.

    Where `whole_island` is set the level joins each island, whatever its size, and `span_devices`
    is the greatest common divisor of the islands' sizes: blocks of that size never cross a
    boundary. Files write it as `span_devices: island`.
    """

    model_config = FROZEN

    name: str
    span_devices: int = Field(ge=1)
    latency_s: float = Field(ge=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    pair_bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    achieved_fraction: float = Field(default=0.8, gt=0, le=1)
    fabric: Fabric | None = None
    torus: Torus | None = None
    whole_island: bool = False

    def reached_bytes_per_s(self, peers: int) -> float:
        """What one device sends to `peers` others of its level at once, with large messages."""
        nominal = self.bandwidth_bytes_per_s
        if self.torus is not None:
            nominal *= min(1.0, peers / self.torus.links_per_device)
        if self.pair_bandwidth_bytes_per_s is not None:
            nominal = min(nominal, peers * self.pair_bandwidth_bytes_per_s)
        return nominal * self.achieved_fraction

    def changed(self, change: LevelChange) -> Level:
        """The level with the fields that `change` gives."""
        return self.model_copy(update=change.model_dump(exclude={"name"}, exclude_none=True))

    def slowed(self, fraction: float) -> Level:
        """The level at that fraction of its bandwidths."""
        if fraction == 1:
            return self
        pair = self.pair_bandwidth_bytes_per_s
        return self.model_copy(
            update={
                "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s * fraction,
                "pair_bandwidth_bytes_per_s": None if pair is None else pair * fraction,
            }
        )


class LevelChange(BaseModel):
    """What differs in one island from the cluster's level of that name."""

    model_config = FROZEN

    name: str
    latency_s: float | None = Field(default=None, ge=0)
    bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    pair_bandwidth_bytes_per_s: float | None = Field(default=None, gt=0)
    achieved_fraction: float | None = Field(default=None, gt=0, le=1)


def slowest_level(variants: tuple[Level, ...]) -> Level:
    """One level that is in every respect as slow as the slowest of its variants.

    `reached_bytes_per_s` of the result is, for any number of peers, the least of the variants'.
    """
    first = variants[0]
    if all(variant == first for variant in variants):
        return first
    achieved = min(variant.achieved_fraction for variant in variants)
    bandwidth = min(v.bandwidth_bytes_per_s * v.achieved_fraction for v in variants) / achieved
    pairs = [
        v.pair_bandwidth_bytes_per_s * v.achieved_fraction / achieved
        for v in variants
        if v.pair_bandwidth_bytes_per_s is not None
    ]
    return first.model_copy(
        update={
            "latency_s": max(variant.latency_s for variant in variants),
            "bandwidth_bytes_per_s": bandwidth,
            "pair_bandwidth_bytes_per_s": min(pairs, default=None),
            "achieved_fraction": achieved,
        }
    )
