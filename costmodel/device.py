"""One accelerator: what it can hold, how fast it computes and moves bytes.

A `Device` is one device as the framework counts them (torch: one `cuda:i`). Presets with their
sources are in `data/devices.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import yaml_files
from .efficiency import ComputeDtype, EfficiencyCurve, KernelClass

_WIDER: dict[ComputeDtype, ComputeDtype] = {
    "float8": "bfloat16",
    "bfloat16": "float32",
    "float16": "float32",
    "tf32": "float32",
    "float32": "float64",
}

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PeakFlops(BaseModel):
    """Peak dense FLOP/s of matrix products per dtype; None where the device has no such units."""

    model_config = _FROZEN

    float64: float | None = Field(default=None, gt=0)
    float32: float | None = Field(default=None, gt=0)
    tf32: float | None = Field(default=None, gt=0)
    bfloat16: float | None = Field(default=None, gt=0)
    float16: float | None = Field(default=None, gt=0)
    float8: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one(self) -> PeakFlops:
        if self.float32 is None and self.float64 is None:
            raise ValueError("expected a peak for float32 or float64")
        return self


class Device(BaseModel):
    """An accelerator.

    Bytes, seconds, FLOP/s and bytes/s throughout. Efficiencies are the fractions of the peak that
    large shapes of a training step reach (of matrix products: those that fill all
    `multiprocessors` with whole tiles, see `compute.product_efficiency`);
    `portable_attention_fraction` is what FlashAttention-2 reaches, where that is less than the
    maker's kernel. `kernel_launch_s` is the least an op takes; `reserve_bytes` is what a training
    process holds beyond what a plan accounts
    for. `curves`, where there are any, are measured and go before the fractions. Tiers that state
    can be moved to (`offload`), where there are any, as one device's share: `host_memory_bytes`
    over `host_link_bytes_per_s`, `nvme_bytes` at `nvme_bytes_per_s`, one direction each. What it
    costs: `price_per_hour` in any one currency, `power_watts` computing and `idle_watts` waiting.
    """

    model_config = _FROZEN

    name: str
    memory_bytes: int = Field(gt=0)
    peak_flops_per_s: PeakFlops
    memory_bandwidth_bytes_per_s: float = Field(gt=0)
    matmul_efficiency_fraction: float = Field(gt=0, le=1)
    attention_efficiency_fraction: float = Field(gt=0, le=1)
    portable_attention_fraction: float | None = Field(default=None, gt=0, le=1)
    memory_efficiency_fraction: float = Field(gt=0, le=1)
    kernel_launch_s: float = Field(ge=0)
    reserve_bytes: int = Field(ge=0)
    multiprocessors: int | None = Field(default=None, gt=0)
    host_s_per_call: float | None = Field(default=None, ge=0)
    host_memory_bytes: int | None = Field(default=None, gt=0)
    host_link_bytes_per_s: float | None = Field(default=None, gt=0)
    nvme_bytes: int | None = Field(default=None, gt=0)
    nvme_bytes_per_s: float | None = Field(default=None, gt=0)
    price_per_hour: float | None = Field(default=None, gt=0)
    power_watts: float | None = Field(default=None, gt=0)
    idle_watts: float | None = Field(default=None, gt=0)
    curves: tuple[EfficiencyCurve, ...] = ()

    @model_validator(mode="after")
    def _reserve_fits(self) -> Device:
        if self.reserve_bytes >= self.memory_bytes:
            raise ValueError(
                f"reserve_bytes is {self.reserve_bytes}, expected less than memory_bytes "
                f"({self.memory_bytes})"
            )
        if self.idle_watts is not None and self.idle_watts > (self.power_watts or 0.0):
            raise ValueError(
                f"idle_watts is {self.idle_watts:g}, expected at most power_watts "
                f"({'not given' if self.power_watts is None else f'{self.power_watts:g}'})"
            )
        return self

    @property
    def memory_limit_bytes(self) -> int:
        """What a plan may use: memory without the reserve."""
        return self.memory_bytes - self.reserve_bytes

    def measured_seconds(
        self, kind: KernelClass, dtype: ComputeDtype, work: float, backward: bool
    ) -> float | None:
        """Seconds of one kernel by the measured curve for its kind, or None where there is none.

        `work` in FLOPs for matmul and attention, in bytes for other kinds, for which a curve of
        another dtype will do. Without a curve of the backward pass that of forward serves.
        """
        if not self.curves:
            return None
        wanted = "backward" if backward else "forward"
        every = [c for c in self.curves if c.kind == kind]
        fitting = [c for c in every if c.dtype == dtype]
        if kind not in ("matmul", "attention"):
            fitting = fitting or every
        for direction in (wanted, "forward"):
            for curve in fitting:
                if curve.direction == direction:
                    return curve.seconds(work)
        return None

    def peak(self, dtype: ComputeDtype) -> float:
        """Peak dense FLOP/s in a dtype, or in the next wider one that the device has units for.

        Example: a V100 has no bfloat16, so bfloat16 runs at the float32 rate.
        """
        rate: float | None = getattr(self.peak_flops_per_s, dtype)
        while rate is None:
            dtype = _WIDER.get(dtype, "float32")
            rate = getattr(self.peak_flops_per_s, dtype)
        return rate

    @staticmethod
    def preset(name: str) -> Device:
        """A published accelerator; raises InvalidInput with the nearest names if unknown."""
        table = yaml_files.packaged("devices")
        data: dict[str, Any] = {"name": name, **yaml_files.pick(table, name, "device")}
        return yaml_files.validated(Device, data, f"device preset {name}")

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names that `preset` takes, in the order of the data file."""
        return tuple(yaml_files.packaged("devices"))

    @staticmethod
    def worst(devices: Sequence[Device], compute_fraction: float = 1.0) -> Device:
        """As slow and as small in everything as the slowest of several devices, arithmetic at a
        fraction of its pace.

        What products, attention and memory reach, peak times efficiency, is the least of the
        devices'. The rest is that of the device that is slowest at products. Measured curves are
        left out where there are several devices.
        """
        dtypes: tuple[ComputeDtype, ...] = get_args(ComputeDtype)

        def matmul(device: Device, dtype: ComputeDtype) -> float:
            return device.peak(dtype) * device.matmul_efficiency_fraction

        slowest = min(devices, key=lambda device: matmul(device, "bfloat16"))
        fraction = slowest.matmul_efficiency_fraction
        peaks = {
            dtype: compute_fraction * min(matmul(device, dtype) for device in devices) / fraction
            for dtype in dtypes
            if all(getattr(device.peak_flops_per_s, dtype) is not None for device in devices)
        }
        wide = slowest.peak("bfloat16")
        attention = [d.attention_efficiency_fraction * d.peak("bfloat16") for d in devices]
        portable = [
            (d.portable_attention_fraction or d.attention_efficiency_fraction) * d.peak("bfloat16")
            for d in devices
        ]
        memory_fraction = slowest.memory_efficiency_fraction
        bandwidth = min(
            device.memory_bandwidth_bytes_per_s * device.memory_efficiency_fraction
            for device in devices
        )
        most = {
            name: max(getattr(device, name) for device in devices)
            for name in ("kernel_launch_s", "reserve_bytes")
        }
        for name in ("host_link_bytes_per_s", "host_memory_bytes"):
            every = [getattr(device, name) for device in devices]
            most[name] = None if None in every else min(every)
        changes = {
            "name": "+".join(dict.fromkeys(device.name for device in devices)),
            "memory_bytes": min(device.memory_bytes for device in devices),
            "peak_flops_per_s": PeakFlops(**peaks),
            "attention_efficiency_fraction": min(1.0, min(attention) / wide),
            "portable_attention_fraction": min(1.0, min(portable) / wide),
            "memory_bandwidth_bytes_per_s": bandwidth / memory_fraction,
            "curves": tuple(curve.slowed(compute_fraction) for curve in slowest.curves)
            if len(devices) == 1
            else (),
            **most,
        }
        return slowest.model_copy(update=changes)

    @staticmethod
    def parse(spec: str) -> Device:
        """The name of a preset, or the path of a device file; raises InvalidInput for neither."""
        if spec.lower().endswith((".yaml", ".yml")) or Path(spec).is_file():
            return Device.load(spec)
        return Device.preset(spec)

    @staticmethod
    def load(path: str | Path) -> Device:
        """Reads a device file; raises InvalidInput naming field, value and line."""
        return yaml_files.load(Device, path)

    def save(self, path: str | Path) -> None:
        """Writes a device file that `load` reads."""
        yaml_files.save(self.model_dump(exclude_none=True), path)
