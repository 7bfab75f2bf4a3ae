"""`shardwright calibrate`: measures the device at hand and writes a device file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast, get_args

from rich.console import Console
from rich.table import Table

from ...ir.errors import InvalidInput
from ..device import Device
from ..efficiency import ComputeDtype
from ..ranks import (
    DeviceKind,
    Report,
    Team,
    alone,
    check_writable,
    launched,
    progress,
    team_of,
    write_whole,
)
from .device_file import device_of
from .machine import machine
from .measure import Samples, sampled

CALIBRATE_S = 60.0
"""Default time for measuring: two slow cores reach main memory and their peak in it."""
_JOIN_S = 120.0
_CPU_DTYPES: tuple[ComputeDtype, ...] = ("float32", "bfloat16")
_CUDA_DTYPES: tuple[ComputeDtype, ...] = ("bfloat16", "float16", "tf32", "float32")
_FLOAT8_CAPABILITY = (8, 9)
"""GPUs from Ada and Hopper on have float8 units."""


_FLAT_WORK, _FLAT_TIME = 64, 2
"""A curve is flat whose last kernel does so many times the work of its first, in less than so many
times the time."""


def run_calibrate(
    output: str | Path = "device.yaml",
    *,
    budget_s: float = CALIBRATE_S,
    dtypes: Sequence[str] = (),
    device: str = "auto",
    environ: Mapping[str, str] = os.environ,
    debug: bool = False,
) -> None:
    """Writes a device file of what this device reaches.

    Under torchrun or srun all ranks measure at once, as they compute at once when they train, and
    the file is of one rank. `dtypes` default to what the device computes in, float32 included;
    `device` is auto, cpu or cuda. Raises InvalidInput for a budget, dtype or device that is none,
    and where the file cannot be written.
    """
    kind = checked_kind(device)
    if not budget_s > 0:
        raise InvalidInput(f"--budget is {budget_s:g}, expected seconds above 0")
    wanted = _checked_dtypes(dtypes)
    check_writable(output)
    ranks: AbstractContextManager[Team]
    if (environ.get("WORLD_SIZE") or environ.get("SLURM_STEP_NUM_TASKS") or "1") != "1":
        ranks = team_of(launched(environ, "calibrate"), _JOIN_S, kind, debug)
    else:
        ranks = nullcontext(alone(kind))
    with ranks as team:
        _say_if_busy(team)
        with progress(team, "calibrate") as report:
            found = calibrated(team, wanted, budget_s, report)
        if found is not None:
            made, samples = found
            for note in implausible(samples):
                Console(stderr=True).print(f"note: {note}")
            write_whole(output, made.save)
            Console(width=100).print(table(made, samples), f"wrote {output}")


def calibrated(
    team: Team,
    dtypes: tuple[ComputeDtype, ...],
    budget_s: float,
    report: Report = lambda share, what: None,
) -> tuple[Device, Samples] | None:
    """The device that this rank computes on, from about `budget_s` seconds of measuring; on rank 0
    only. Without `dtypes` it is measured in those that it has."""
    here = machine(team)
    if not dtypes:
        dtypes = _dtypes_of(team)
    free_bytes = team.told(lambda: here.free_bytes)
    samples = sampled(team, dtypes, budget_s, free_bytes, report)
    return None if samples is None else (device_of(here, samples), samples)


def checked_kind(device: str) -> DeviceKind:
    """The flag as a kind of device; raises InvalidInput for another word."""
    if device not in get_args(DeviceKind):
        raise InvalidInput(f"--on {device}: expected auto, cpu or cuda")
    return cast(DeviceKind, device)


def _checked_dtypes(dtypes: Sequence[str]) -> tuple[ComputeDtype, ...]:
    known = get_args(ComputeDtype)
    for dtype in dtypes:
        if dtype not in known:
            raise InvalidInput(f"--dtypes has {dtype!r}, expected some of {', '.join(known)}")
    if dtypes and not {"float32", "float64"} & set(dtypes):
        raise InvalidInput(
            f"--dtypes is {','.join(dtypes)}, expected float32 or float64 among them: "
            "normalisation and optimizers compute in it"
        )
    return tuple(cast(ComputeDtype, dtype) for dtype in dict.fromkeys(dtypes))


def _dtypes_of(team: Team) -> tuple[ComputeDtype, ...]:
    if team.device.type == "cpu":
        return _CPU_DTYPES
    import torch

    newest = torch.cuda.get_device_capability(team.device) >= _FLOAT8_CAPABILITY
    return (*_CUDA_DTYPES, "float8") if newest else _CUDA_DTYPES


def _say_if_busy(team: Team) -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if team.world_size == 1 and team.device.type == "cpu" and load > cores / 2:
        Console(stderr=True).print(
            f"note: the machine is busy (load {load:.1f} on {cores} cores), rates will be too low"
        )


def implausible(samples: Samples) -> tuple[str, ...]:
    """What cannot be the device's doing: kernels that take as long however much they do. Where
    other work holds the cores, a call takes a turn of the scheduler at any size."""
    found = []
    for (kind, dtype, direction), curve in sorted(samples.points.items()):
        small, large = curve[0], curve[-1]
        if large.work >= _FLAT_WORK * small.work and large.seconds < _FLAT_TIME * small.seconds:
            found.append(
                f"{kind} {dtype} {direction} takes {large.seconds * 1e3:.2g} ms whatever its size: "
                "something else holds the device; measure again when it is idle, or for longer"
            )
    return tuple(found)


def table(device: Device, samples: Samples) -> Table:
    """Best rates by kind and dtype, and how large the kernel was that reached half of them."""
    made = Table("kernel", "dtype", "direction", "best", "half at", title=f"{device.name}")
    for curve in device.curves:
        flops = curve.kind in ("matmul", "attention")
        best = max(curve.rate_per_s)
        half = next(
            w for w, rate in zip(curve.work, curve.rate_per_s, strict=True) if rate >= best / 2
        )
        unit = "FLOP" if flops else "B"
        made.add_row(
            curve.kind, curve.dtype, curve.direction, f"{best / 1e9:.4g} G{unit}/s",
            f"{half:.2g} {unit}",
        )  # fmt: skip
    for (kind, dtype, direction), reason in sorted(samples.failed.items()):
        made.add_row(kind, dtype, direction, "not done", reason)
    launch, host = device.kernel_launch_s, device.host_s_per_call or 0.0
    made.caption = f"least kernel {launch * 1e6:.2g} µs, host {host * 1e6:.2g} µs per call"
    return made
