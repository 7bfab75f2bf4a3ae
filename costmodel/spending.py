"""What a step spends: time, money or energy.

All devices of a job are paid for as long as it runs. A device draws `power_watts` while it computes
and `idle_watts` while it waits, where the device file gives both; otherwise `power_watts`
throughout, since a device that waits for a collective spins.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from ..ir.errors import InvalidInput
from .cluster import Cluster
from .device import Device

Objective = Literal["time", "cost", "energy"]

_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class Spending:
    """What a step spends in the unit of an objective: so much per second that it takes, and so much
    more per second that its devices compute, on average."""

    objective: Objective
    per_second: float = 1.0
    per_busy_second: float = 0.0

    def of(self, step_s: float, busy_s: float) -> float:
        """Of a step of `step_s` in which a device computes for `busy_s`."""
        return self.per_second * step_s + self.per_busy_second * busy_s

    @property
    def unit(self) -> str:
        """Of what is spent; prices are in whatever currency the device file has them in."""
        return {"time": "s", "cost": "currency units", "energy": "J"}[self.objective]

    @staticmethod
    def on(objective: str, cluster: Cluster) -> Spending:
        """By the prices or the power of a cluster's devices. Raises InvalidInput for another
        objective, and where the devices do not say what it asks for."""
        if objective == "time":
            return Spending("time")
        devices = Counter[Device]()
        if cluster.islands:
            for island in cluster.islands:
                devices[island.device or cluster.device] += island.nodes * cluster.devices_per_node
        else:
            devices[cluster.device] = cluster.world_size
        if objective == "cost":
            prices = [n * _given(d, "price_per_hour", objective) for d, n in devices.items()]
            return Spending("cost", sum(prices) / _HOUR_S)
        if objective != "energy":
            expected = ", ".join(get_args(Objective))
            raise InvalidInput(f"--objective {objective}: expected one of {expected}")
        waiting, more = 0.0, 0.0
        for device, number in devices.items():
            power = _given(device, "power_watts", objective)
            idle = power if device.idle_watts is None else device.idle_watts
            waiting, more = waiting + number * idle, more + number * (power - idle)
        return Spending("energy", waiting, more)


def _given(device: Device, field: str, objective: str) -> float:
    value: float | None = getattr(device, field)
    if value is None:
        raise InvalidInput(
            f"--objective {objective}: device {device.name} has no {field}; give it in the cluster "
            f"file, such as device: {{preset: {device.name}, {field}: "
            f"{'2.50' if field == 'price_per_hour' else '700'}}}"
        )
    return value
