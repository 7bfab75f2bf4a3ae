"""Runs torch's pipeline schedules on 4 gloo ranks and writes down when each action ran.

    python pipeline_worker.py FOLDER MICROBATCHES

Starts the ranks by forking, so that torch is imported once. Writes FOLDER/events.json:
schedule → [rank, action as torch writes it, start, end], in seconds of one clock.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

RANKS, ROWS, WIDTH = 4, 2, 16

Events = list[tuple[int, str, float, float]]

# of each schedule: torch's class and the stages of a rank
CASES: dict[str, tuple[str, Callable[[int], list[int]]]] = {
    "gpipe": ("ScheduleGPipe", lambda rank: [rank]),
    "1f1b": ("Schedule1F1B", lambda rank: [rank]),
    "interleaved": ("ScheduleInterleaved1F1B", lambda rank: [rank, rank + RANKS]),
    "zb-h1": ("ScheduleInterleavedZeroBubble", lambda rank: [rank]),
    "zb-v": ("ScheduleZBVZeroBubble", lambda rank: [rank, 2 * RANKS - 1 - rank]),
}


class Recorded(PipelineStage):
    """A stage that notes its actions."""

    events: Events

    def _note(self, kind: str, microbatch: int, run: Callable[[], Any]) -> Any:
        start = time.monotonic()
        result = run()
        action = f"{self.stage_index}{kind}{microbatch}"
        self.events.append((self.group_rank, action, start, time.monotonic()))
        return result

    def forward_one_chunk(self, index: int, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward_one_chunk
        return self._note("F", index, lambda: forward(index, *args, **kwargs))

    def backward_one_chunk(
        self, index: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> Any:
        kind, backward = "B" if full_backward else "I", super().backward_one_chunk
        return self._note(kind, index, lambda: backward(index, loss, full_backward, last_backward))

    def backward_weight_one_chunk(self, index: int, last_backward: bool = False) -> Any:
        backward = super().backward_weight_one_chunk
        return self._note("W", index, lambda: backward(index, last_backward))


def run_schedule(name: str, rank: int, microbatches: int) -> Events:
    """The events of this rank in one step."""
    class_name, stages_of = CASES[name]
    indices = stages_of(rank)
    count, events = RANKS * len(indices), []
    passed = torch.empty(ROWS, WIDTH, device="meta", requires_grad=True)
    stages = []
    for index in indices:
        torch.manual_seed(index)
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        stage = Recorded(
            module, index, count, torch.device("cpu"), input_args=(passed,), output_args=(passed,)
        )
        stage.events = events
        stages.append(stage)
    schedule_class = getattr(torch_schedules, class_name)
    multi = issubclass(schedule_class, torch_schedules.PipelineScheduleMulti)
    schedule = schedule_class(
        stages if multi else stages[0], microbatches, loss_fn=lambda out, _: out.square().sum()
    )
    batch = torch.ones(ROWS * microbatches, WIDTH)
    dist.barrier()
    schedule.step(
        *([batch] if 0 in indices else []),
        target=batch if count - 1 in indices else None,
        losses=[] if count - 1 in indices else None,
    )
    return events


def work(rank: int, folder: Path, microbatches: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    found = {name: run_schedule(name, rank, microbatches) for name in CASES}
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, found)
    if rank == 0:
        merged = {name: [event for one in gathered for event in one[name]] for name in CASES}
        (folder / "events.json").write_text(json.dumps(merged))
    dist.destroy_process_group()


def main(folder: Path, microbatches: int) -> int:
    """The worst exit code of the ranks."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=work, args=(r, folder, microbatches)) for r in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
