"""Verification: an emitted JAX program on host CPU devices against the single-device model.

One step's gradients over all microbatches, on the same weights and the same global batch, some of
whose labels are ignored where the model knows that. Compared are the loss and the gradient of every
parameter. The judge is the original torch module, or the JAX function.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file, save_file

from ...ir.plan import Plan
from ..judging import check_dtype, judged, unjudged
from . import emit

START_TIMEOUT_S = 60.0
CASE_TIMEOUT_S = 120.0

WORKER = Path(__file__).with_name("verify_worker.py")


class Judge(Protocol):
    """The single-device model that programs are compared with."""

    def save(self, path: Path) -> None:
        """Writes its weights as safetensors."""

    def batch(self, plan: Plan) -> dict[str, np.ndarray]:
        """A global batch for a plan."""

    def run(self, batch: Mapping[str, np.ndarray]) -> tuple[float, Mapping[str, np.ndarray]]:
        """The mean loss of a batch, and the gradient under each name of each parameter."""


def verify_many(
    plans: Sequence[Plan], *, model: Any, loss: Any = None, dtype: str = "float64"
) -> list[dict[str, Any]]:
    """`compare` with a torch module, and its loss where it has none of its own."""
    from .module_reference import ModuleReference

    used = {name for plan in plans for name in plan.model.parameters}
    return compare(plans, ModuleReference(model, check_dtype(dtype), loss, used), dtype=dtype)


def compare(
    plans: Sequence[Plan], reference: Judge, *, dtype: str = "float64"
) -> list[dict[str, Any]]:
    """Emits plans of one model, runs them on host devices in one process, compares each.

    Returns what `shardwright verify --json` prints, per plan. Raises InvalidInput for an unknown
    dtype and for plans that cannot be emitted.
    """
    check_dtype(dtype)
    with tempfile.TemporaryDirectory(prefix="shardwright-verify-") as temporary:
        root = Path(temporary)
        reference.save(root / "weights.safetensors")
        batches = [reference.batch(plan) for plan in plans]
        jobs = [
            _job(plan, batch, root / f"case-{i}", root, dtype)
            for i, (plan, batch) in enumerate(zip(plans, batches, strict=True))
        ]
        _start(jobs, root, max(plan.strategy.ranks for plan in plans))
        return [
            _result(plan, job, reference, batch, dtype, root)
            for plan, job, batch in zip(plans, jobs, batches, strict=True)
        ]


def _job(
    plan: Plan, batch: Mapping[str, np.ndarray], out: Path, root: Path, dtype: str
) -> dict[str, str]:
    """The emitted folder and the batch of a case; what the worker is told."""
    out.mkdir()
    emit(plan, out / "program")
    save_file({n: np.ascontiguousarray(rows) for n, rows in batch.items()},
              out / "batch.safetensors")  # fmt: skip
    return {
        "folder": str((out / "program").resolve()),
        "precision": {"float64": "fp64", "float32": "fp32"}[dtype],
        "weights": str(root / "weights.safetensors"),
        "batch": str(out / "batch.safetensors"),
        "out": str(out),
    }


def _start(jobs: Sequence[dict[str, str]], root: Path, devices: int) -> None:
    """Runs all cases in one process with so many devices."""
    (root / "job.json").write_text(json.dumps(jobs))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    # -P: the folder of the worker stays off sys.path, where its modules could hide a program's.
    command = [sys.executable, "-P", str(WORKER), str(root / "job.json")]
    with (root / "worker.log").open("w") as log:
        try:
            timeout_s = START_TIMEOUT_S + CASE_TIMEOUT_S * len(jobs)
            subprocess.run(
                command, env=environment, stdout=log, stderr=log, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            log.write("no answer in time\n")


def _result(
    plan: Plan,
    job: dict[str, str],
    reference: Judge,
    batch: Mapping[str, np.ndarray],
    dtype: str,
    root: Path,
) -> dict[str, Any]:
    """Compares what the worker left behind with the single-device model on the same batch."""
    out = Path(job["out"])
    result = unjudged(plan.strategy.ranks, plan.strategy.to_json(), dtype)
    if not (out / "result.safetensors").exists():
        file = out / "error" if (out / "error").exists() else root / "worker.log"
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        return result | {"error": lines[-1] if lines else "the program gave no answer"}
    single, expected = reference.run(batch)
    tensors = load_file(out / "result.safetensors")
    found = float(tensors.pop("loss"))
    if unknown := sorted(set(tensors) - set(expected)):
        return result | {"error": f"the program trains {unknown[0]!r}, which the model does not"}
    differences = {
        name: abs(tensors[name] - gradient) if name in tensors else gradient * np.nan
        for name, gradient in expected.items()
    }
    return result | judged(single, found, differences, expected, dtype)
