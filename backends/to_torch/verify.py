"""Verification: an emitted program on local CPU ranks against the single-device model.

One step's forward and backward pass over all microbatches, on the same weights and the same global
batch, some of whose labels are ignored. Compared are the loss and the gradient of every parameter,
on every rank that holds a part of it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...ir.errors import InvalidInput
from ...ir.plan import Plan
from ..judging import check_dtype, judged, unjudged
from .reference import Loss, Reference

START_TIMEOUT_S = 60.0
CASE_TIMEOUT_S = 60.0

WORKER = Path(__file__).with_name("verify_worker.py")


@dataclass(frozen=True)
class Case:
    """One emitted folder, and the strategy that is reported with it.

    `batch` (name → tensor with a row per sample) replaces the one that is made from the emitted
    model's inputs.
    """

    folder: Path
    ranks: int
    strategy: Mapping[str, Any] = field(default_factory=dict)
    batch: Mapping[str, Tensor] | None = None


class Judge(Protocol):
    """The single-device model that programs are compared with."""

    def save(self, path: Path) -> None:
        """Writes its weights as safetensors."""

    def run(self, batch: Mapping[str, Tensor]) -> tuple[float, Mapping[str, Tensor]]:
        """The mean loss of a batch, and the gradient under each name of each parameter."""


def verify(
    plan: Plan,
    *,
    model: nn.Module,
    loss: Loss | None = None,
    dtype: str = "float64",
    backend: str = "torch",
) -> dict[str, Any]:
    """Emits a plan, runs it on local ranks and compares it with `model` on one device.

    `model` is the module that was planned; it is moved to the CPU and to `dtype`, and its weights
    are perturbed. Returns `{"equal", "loss": {"single", "sharded"}, "worst_gradient": {"name",
    "relative_error"}, "ranks", "strategy", "dtype", "tolerance"}`, and `"error"` where the program
    failed. Raises InvalidInput for an unknown dtype or backend.
    """
    return verify_many([plan], model=model, loss=loss, dtype=dtype, backend=backend)[0]


def verify_many(
    plans: Sequence[Plan],
    *,
    model: nn.Module,
    loss: Loss | None = None,
    dtype: str = "float64",
    backend: str = "torch",
) -> list[dict[str, Any]]:
    """`verify` for several plans of one model, on ranks that are started once."""
    from . import emit

    if backend != "torch":
        raise InvalidInput(f"backend {backend!r}: this verifies 'torch'")
    used = {name for plan in plans for name in plan.model.parameters}
    reference = Reference(model, torch_dtype(dtype), loss, used)
    with tempfile.TemporaryDirectory(prefix="shardwright-verify-") as folder:
        cases = []
        for i, plan in enumerate(plans):
            emit(plan, Path(folder) / f"program-{i}")
            cases.append(
                Case(Path(folder) / f"program-{i}", plan.strategy.ranks, plan.strategy.to_json())
            )
        return compare(cases, reference, dtype=dtype)


def compare(
    cases: Sequence[Case], reference: Judge, *, dtype: str = "float64"
) -> list[dict[str, Any]]:
    """Runs emitted folders on one start of local ranks and compares each with the reference.

    Returns one result per case, as `verify` does. When a rank dies or time runs out, its case is
    reported with the error and the cases after it run on a new start.
    """
    torch_dtype(dtype)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shardwright-ranks-") as temporary:
        root = Path(temporary)
        reference.save(root / "weights.safetensors")
        jobs = [_job(case, root / f"case-{i}", root, dtype) for i, case in enumerate(cases)]
        while len(results) < len(cases):
            pending = jobs[len(results) :]
            failed = _start(pending, root)
            done = [job for job in pending if _is_done(job)]
            for job in done:
                results.append(_compare(cases[len(results)], Path(job["out"]), reference, dtype))
            if len(done) < len(pending):
                error = _error(Path(pending[len(done)]["out"]), failed)
                if error or not done:
                    error = error or f"the ranks could not be started: {_last_line(root)}"
                    results.append(_result(cases[len(results)], dtype) | {"error": error})
    return results


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a verification. Raises InvalidInput for one without a tolerance."""
    found: torch.dtype = getattr(torch, check_dtype(name))
    return found


# --- the ranks -----------------------------------------------------------------------------------


def _job(case: Case, out: Path, root: Path, dtype: str) -> dict[str, Any]:
    """What the worker is told about a case."""
    out.mkdir()
    given = out / "given.safetensors"
    if case.batch is not None:
        save_file({name: t.contiguous() for name, t in case.batch.items()}, given)
    return {
        "folder": str(case.folder.resolve()),
        "ranks": case.ranks,
        "precision": {"float64": "fp64", "float32": "fp32"}[dtype],
        "weights": str(root / "weights.safetensors"),
        "batch": str(given) if case.batch is not None else None,
        "out": str(out),
    }


def _start(jobs: Sequence[Mapping[str, Any]], root: Path) -> str:
    """Runs cases on one start of ranks; returns the rank that failed first, "" if none did."""
    timeout_s = START_TIMEOUT_S + CASE_TIMEOUT_S * len(jobs)
    # Of this start alone: a store where ranks of an earlier one registered would mislead these.
    here = Path(tempfile.mkdtemp(prefix="start-", dir=root))
    first_failure = here / "first-failure"
    job = {
        "cases": list(jobs),
        "timeout_s": timeout_s,
        "first_failure": str(first_failure),
        "stores": str(here),
    }
    (here / "job.json").write_text(json.dumps(job))
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""}
    # -P: the folder of the worker stays off sys.path, where its modules could hide a program's.
    command = [sys.executable, "-P", str(WORKER), str(here / "job.json")]
    with (root / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            worker.wait(timeout_s + 20)
        except subprocess.TimeoutExpired:
            pass  # what is missing is reported
        finally:
            worker.terminate()
            worker.wait()
    return first_failure.read_text() if first_failure.exists() else ""


def _is_done(job: Mapping[str, Any]) -> bool:
    out = Path(job["out"])
    return all((out / f"rank-{rank}.json").exists() for rank in range(job["ranks"]))


def _error(out: Path, failed: str) -> str | None:
    """What went wrong in a case, in one line; None if nothing did in this one."""
    traceback = out / f"rank-{failed}.error"
    if traceback.exists():
        lines = [line for line in traceback.read_text().splitlines() if line.strip()]
        return f"rank {failed}: {lines[-1].strip() if lines else 'it died without a traceback'}"
    for stack in sorted(out.glob("rank-*.error")):  # of ranks that still ran when time was up
        lines = [line.strip() for line in stack.read_text().splitlines() if "File" in line]
        return f"no answer in time; {stack.stem} was at {lines[0] if lines else 'an unknown place'}"
    return None


def _last_line(root: Path) -> str:
    log = (root / "worker.log").read_text().strip().splitlines()
    return log[-1] if log else "no message"


# --- the comparison ------------------------------------------------------------------------------


def _result(case: Case, dtype: str) -> dict[str, Any]:
    return unjudged(case.ranks, case.strategy, dtype)


def _compare(case: Case, out: Path, reference: Judge, dtype: str) -> dict[str, Any]:
    """Compares what the ranks left behind with the single-device model on the same batch."""
    single, expected = reference.run(load_file(out / "batch.safetensors"))
    losses: list[float] = []
    differences = {name: torch.full_like(g, torch.nan) for name, g in expected.items()}
    for rank in range(case.ranks):
        tensors = load_file(out / f"rank-{rank}.safetensors")
        losses.append(tensors["loss"].item())
        for place in json.loads((out / f"rank-{rank}.json").read_text()):
            if place["name"] not in expected:
                error = f"the program trains {place['name']!r}, which the model does not have"
                return _result(case, dtype) | {"error": error}
            part = tensors[place["key"]]
            box = tuple(slice(a, a + n) for a, n in zip(place["begin"], part.shape, strict=True))
            off = (part - expected[place["name"]][box]).abs()
            seen = differences[place["name"]][box]
            # Copies on several ranks: the worst counts. An element on no rank stays nan.
            differences[place["name"]][box] = torch.where(seen.isnan(), off, seen.maximum(off))
    sharded = max(losses, key=lambda loss: (loss != loss, abs(loss - single)))
    return _result(case, dtype) | judged(single, sharded, differences, expected, dtype)
