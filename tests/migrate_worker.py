"""Runs train.py of emitted programs on forked ranks: `python migrate_worker.py JOBS.json`.

A job is a list of processes, each with its `folder`, `arguments` and environment (`RANK`, …); they
start at once and end by themselves, a lost one in the middle. Torch is imported once for all. Exits
with 1 and the ranks' output where one fails or time is up.
"""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

# What emitted programs import: loaded before the fork, so that it is loaded once.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor


def main(file: str) -> int:
    """All jobs, one after another."""
    for number, job in enumerate(json.loads(Path(file).read_text())):
        logs = [Path(file).parent / f"job-{number}-{i}.log" for i in range(len(job["processes"]))]
        children = {
            start(process, log, job["timeout_s"]): log
            for process, log in zip(job["processes"], logs, strict=True)
        }
        failed, until = False, time.monotonic() + job["timeout_s"]
        while children and not failed:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                children.pop(child)
            failed = bool(child and status) or time.monotonic() > until
            time.sleep(0.02)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if failed:
            print(f"job {number}", *(f"--- {log}\n{log.read_text()}" for log in logs), sep="\n")
            return 1
    return 0


def start(process: dict[str, Any], log: Path, limit_s: float) -> int:
    """One process of a job; says where it is when time is nearly up."""
    child = os.fork()
    if child:
        return child
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.dump_traceback_later(max(1.0, 0.9 * limit_s), file=sys.__stderr__)
    torch.set_num_threads(1)
    os.environ |= process["environment"]
    program = Path(process["folder"]) / "train.py"
    sys.argv = [str(program), *process["arguments"]]
    sys.path.insert(0, process["folder"])
    os.chdir(log.parent)
    try:
        runpy.run_path(str(program), run_name="__main__")
    except SystemExit as error:
        print(error)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
