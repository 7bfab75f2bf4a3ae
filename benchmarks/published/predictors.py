"""What predicts a setup: the interface, and Shardwright behind it.

A predictor is a function of a setup and a recompute mode; anything with that shape can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shardwright.ir.from_dims import TransformerDims, transformer
from shardwright.ir.graph import Model
from shardwright.planner.fix import Fix
from shardwright.planner.predict import predict
from shardwright.planner.request import Request

from .setup import Recompute, Setup


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a step takes. `memory_bytes`: all that the driver reports on the fullest device;
    `allocated_bytes`: tensors alone; `breakdown`: seconds by cause, which add up to the step."""

    step_seconds: float
    memory_bytes: float | None
    allocated_bytes: float | None
    fits: bool
    breakdown: Mapping[str, float] = field(default_factory=dict)


Predict = Callable[[Setup, Recompute], Estimate]


def least_that_fits(setup: Setup, predict: Predict) -> Estimate:
    """The estimate with the first recompute mode that fits, or with the last if none does."""
    for mode in setup.recompute:
        estimate = predict(setup, mode)
        if estimate.fits:
            break
    return estimate


class Shardwright:
    """Shardwright's `predict`; models are kept between rows."""

    def __init__(self) -> None:
        self._models: dict[TransformerDims, Model] = {}

    def __call__(self, setup: Setup, recompute: Recompute) -> Estimate:
        if setup.dims not in self._models:
            self._models[setup.dims] = transformer(setup.dims)
        model = self._models[setup.dims]
        fix = Fix.parse({**setup.fix, "recompute": recompute})
        request = Request(model, setup.cluster, setup.workload, fix, setup.runtime)
        found = predict(request)
        device = setup.cluster.device
        most = max(found.memory_bytes)
        return Estimate(
            step_seconds=found.step_seconds,
            memory_bytes=most + device.memory_bytes - found.memory_limit_bytes,
            allocated_bytes=most,
            fits=found.fits,
            breakdown=dict(found.time),
        )
