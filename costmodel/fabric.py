"""What the switches between nodes leave of the NICs' bandwidth, by how flows find their paths.

A leaf switch joins `leaf_devices` and has `uplinks` equal paths to the rest. In a collective all
wait for the slowest flow, so the fullest uplink decides:

    ideal   packets of a flow are sprayed over all paths: each carries F/U flows' worth
    ecmp    a flow takes one path by a hash: the fullest of U carries the expected maximum of F
            balls thrown into U bins (RFC 2992 hashing; Raab & Steger 1998 for its growth; here
            the exact distribution)
    split   flows keep one path each, but those left over when F is divided by U are split in
            equal parts, so that every path carries F/U again: Ethereal (Addanki et al., 2024,
            arXiv:2407.00550), whose congestion equals packet spraying's
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from math import gcd
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ..ir.errors import InvalidInput

FabricMode = Literal["ideal", "ecmp", "split"]

_MOST_FLOWS = 1024
"""What leaves one leaf: switches have up to 128 ports, with a few flows each."""


class Fabric(BaseModel):
    """Leaf switches of a level and their way up.

    `flows_per_device` is how many connections each device sends on at once (queue pairs per NIC);
    `oversubscription` the bandwidth of a leaf's devices over that of its uplinks, 1 where there is
    as much upwards as downwards. A level whose `achieved_fraction` was measured across leaves has
    the fabric in it already.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: FabricMode = "ideal"
    leaf_devices: int = Field(default=32, ge=1, le=_MOST_FLOWS)
    uplinks: int = Field(default=32, ge=1, le=_MOST_FLOWS)
    flows_per_device: int = Field(default=1, ge=1, le=32)
    oversubscription: float = Field(default=1.0, ge=1)

    @cached_property
    def bandwidth_fraction(self) -> float:
        """What the slowest flow that leaves its leaf has of its NIC's bandwidth, all devices of
        the leaf sending at once."""
        flows = min(self.leaf_devices * self.flows_per_device, _MOST_FLOWS)
        fullest = fullest_path_flows(self.mode, flows, self.uplinks)
        return min(1.0, flows / self.uplinks / fullest / self.oversubscription)


def fullest_path_flows(mode: FabricMode, flows: int, paths: int) -> float:
    """Flows on the fullest of `paths` equal paths, `flows` of one size on them; expected for ecmp.

    Raises InvalidInput for counts outside 1 to 1024.
    """
    for name, count in (("flows", flows), ("paths", paths)):
        if not 1 <= count <= _MOST_FLOWS:
            raise InvalidInput(f"fabric: {name} is {count}, expected 1 to {_MOST_FLOWS}")
    return expected_fullest_bin(flows, paths) if mode == "ecmp" else flows / paths


def split_flows(flows: int, paths: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """For each flow the paths it takes and its share on each: one path where it is left whole.

    Every path carries flows/paths. The first ⌊F/U⌋·U flows stay whole; those left over are laid
    end to end over all paths in parts of gcd(left, U)/U, which cuts each into U/gcd. Raises
    InvalidInput for counts below 1.
    """
    if flows < 1 or paths < 1:
        raise InvalidInput(f"{flows} flows over {paths} paths: expected at least 1 of each")
    whole = flows // paths * paths
    plan: list[tuple[tuple[int, float], ...]] = [((i % paths, 1.0),) for i in range(whole)]
    left = flows - whole
    if left:
        common = gcd(left, paths)
        parts = paths // common  # of one flow; each path takes left/common of them
        taken = left // common
        for i in range(left):
            shares: dict[int, float] = {}
            for part in range(i * parts, (i + 1) * parts):
                path = part // taken
                shares[path] = shares.get(path, 0.0) + 1 / parts
            plan.append(tuple(shares.items()))
    return tuple(plan)


@lru_cache(maxsize=1024)
def expected_fullest_bin(balls: int, bins: int) -> float:
    """Expected number of balls in the fullest bin, each thrown into any of the bins alike.

    Exact: balls in bins are independent Poisson variables given their sum, so
    P(max ≤ k) = [truncated Poisson(balls/bins)]^{* bins}(balls) / Poisson(balls)(balls).
    """
    mean = balls / bins
    counts = np.arange(balls + 1, dtype=float)
    logs = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
    one = np.exp(counts * np.log(mean) - mean - logs)
    together = float(np.exp(balls * np.log(balls) - balls - logs[balls]))
    expected = 0.0
    for most in range(balls):  # E[max] = Σ_k P(max > k)
        within = 0.0
        if most * bins >= balls:
            truncated = np.where(counts <= most, one, 0.0)
            within = float(_power(truncated, bins)[balls]) / together
        expected += 1 - min(1.0, within)
        if within > 1 - 1e-12:
            break
    return expected


def _power(distribution: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """Distribution of a sum of `times` independent draws, as far as the array reaches."""
    size = len(distribution)
    total: NDArray[np.float64] | None = None
    while True:
        if times & 1:
            total = distribution if total is None else np.convolve(total, distribution)[:size]
        times >>= 1
        if not times:
            assert total is not None
            return total
        distribution = np.convolve(distribution, distribution)[:size]
