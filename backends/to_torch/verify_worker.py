"""The ranks of a verification: runs emitted folders, one after another, on forked gloo ranks.

A script, not a part of the package: `python verify_worker.py JOB.json` imports torch once, forks
the ranks, and in each of them imports the modules of every folder as the folder's train.py does. It
needs nothing but torch and the folders. Per case it leaves in the case's `out` folder:

    batch.safetensors         the global batch
    rank-R.safetensors        loss, and the boxes of every gradient that rank R holds
    rank-R.json               where these boxes lie in the full tensors
    rank-R.error              instead, if it failed: the traceback
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

# What emitted programs import: loaded before the fork, so that it is loaded once.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__

IGNORED = -100  # labels that are no term of the loss


def main(job_file: str) -> int:
    """Forks the ranks, and stops all when one fails or time is up; returns the exit status."""
    job = json.loads(Path(job_file).read_text())
    children: dict[int, int] = {}
    for rank in range(max(case["ranks"] for case in job["cases"])):
        child = os.fork()
        if child == 0:
            os._exit(_run_rank(job, rank))
        children[child] = rank
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_stop(children)))
    deadline = time.monotonic() + job["timeout_s"]
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            if status:
                _blame(job["first_failure"], rank)
                return _stop(children)
        elif time.monotonic() > deadline:
            return _stop(children)
        else:
            time.sleep(0.01)
    return 0


def _stop(children: dict[int, int]) -> int:
    """Ends the ranks that still run."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    return 1


def _blame(file: str, rank: int) -> None:
    """Writes down which rank failed first; the others fail because of it."""
    with contextlib.suppress(FileExistsError), Path(file).open("x") as first:
        first.write(str(rank))


def _run_rank(job: dict[str, Any], rank: int) -> int:
    """One rank's life: every case that has so many ranks; returns the exit status."""
    torch.set_num_threads(1)
    for case in job["cases"]:
        if rank >= case["ranks"]:
            continue
        out = Path(case["out"])
        error = out / f"rank-{rank}.error"
        with error.open("w") as stacks:  # where it hangs, should time run out
            _watch(stacks, job["timeout_s"])
            try:
                _run_case(case, rank, out, Path(job["stores"]) / out.name)
            except BaseException as failure:
                _blame(job["first_failure"], rank)
                error.write_text(traceback.format_exc() + _root(failure))
                return 1
            faulthandler.cancel_dump_traceback_later()
        error.unlink()
    return 0


def _watch(stacks: TextIO, timeout_s: float) -> None:
    faulthandler.dump_traceback_later(max(1.0, timeout_s * 0.95), file=stacks)


def _root(failure: BaseException) -> str:
    """What went wrong first, in one line: pipelines raise their own error from a stage's."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    said = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {said[0]}" if said else type(failure).__name__


def _run_case(case: dict[str, Any], rank: int, out: Path, meeting: Path) -> None:
    """Runs one emitted program's step and writes what this rank has of the result."""
    folder, ranks = case["folder"], case["ranks"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    store = FileStore(str(meeting), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    sys.path.insert(0, folder)
    before = set(sys.modules)
    _step(case, rank, out)
    # Only after a success: a rank that fails says so before its peers notice.
    dist.barrier()
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    gc.collect()
    dist.destroy_process_group()


def _step(case: dict[str, Any], rank: int, out: Path) -> None:
    import settings  # type: ignore[import-not-found]  # the emitted folder's, as all imports here

    settings.PRECISION = case["precision"]
    import model  # type: ignore[import-not-found]
    import parallel  # type: ignore[import-not-found]
    import step  # type: ignore[import-not-found]
    import weights  # type: ignore[import-not-found]

    parallel.init_mesh(settings.MESH)
    stage = parallel.build(model.STAGES[parallel.axis_rank("pp")], model.BLOCKS)
    weights.load_weights(stage, case["weights"])
    stage.eval()
    whole = (
        load_file(case["batch"])
        if case["batch"]
        else make_batch(model.BATCH, settings.GLOBAL_BATCH, settings.SEQ_LEN, parallel.wide_dtype())
    )
    if rank == 0:
        save_file(whole, out / "batch.safetensors")
    rows = settings.GLOBAL_BATCH // settings.MESH["dp"]
    first = rows * parallel.axis_rank("dp")
    loss = step.Step(stage)({k: v[first : first + rows].clone() for k, v in whole.items()})
    tensors: dict[str, Tensor] = {"loss": loss}
    places: list[dict[str, Any]] = []
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        here = parallel.shard(gradient)
        for box in parallel.rectangles(name):
            key = f"box {len(places)}"
            tensors[key] = here[box.in_local()].contiguous()
            places.append({"name": name, "key": key, "begin": box.full})
    save_file(tensors, out / f"rank-{rank}.safetensors")
    (out / f"rank-{rank}.json").write_text(json.dumps(places))


def make_batch(
    inputs: dict[str, tuple[str, tuple[Any, ...], int]],
    samples: int,
    seq_len: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """A global batch with ignored labels, more of them in later samples, and one without any term.

    `inputs` is the emitted model's BATCH. Floats have the given dtype.
    """
    generator = torch.Generator().manual_seed(20)
    lengths = [seq_len - i * seq_len // (2 * samples) for i in range(samples)]
    within = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    made = {}
    for name, (kind, dims, bound) in inputs.items():
        shape = [{"b": samples, "s": seq_len}.get(dim, dim) for dim in dims]
        if name == "attention_mask":
            made[name] = within.to(getattr(torch, kind))
        elif name == "position_ids":
            made[name] = torch.arange(seq_len).expand(shape).contiguous()
        elif kind == "bool":
            made[name] = torch.rand(shape, generator=generator) < 0.5
        elif kind.startswith("int"):
            made[name] = torch.randint(0, bound, shape, generator=generator)
        else:
            made[name] = torch.randn(shape, generator=generator, dtype=dtype)
    labels = made.get("labels")
    if labels is not None and labels.dtype == torch.int64 and labels.shape == within.shape:
        labels[~within] = IGNORED
        labels[:, seq_len // 2][::3] = IGNORED
        if samples > 2:
            labels[1] = IGNORED
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
