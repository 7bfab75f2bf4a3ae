"""Saves beside training: a step waits only for what it would overwrite.

Weights and optimizer state change in the optimizer's step and nowhere else. So they are copied to
host memory while the next batch is computed, and written to disk while training goes on; the next
update waits for the copy, and the next save for the disk.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import Boxes, Progress, state, write


class Saver:
    """Writes checkpoints to a folder. All ranks make one, and save the same steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # a group of its own: collectives of the thread must not meet those of the step
        self.group = dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1, "saving")
        self.host: dict[str, Tensor] = {}  # copies, used again by the next save
        self.copied: Future[dict[str, Any]] | None = None
        self.written: Future[Path] | None = None

    def save(self, stage: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Begins to save; the one before is on disk when this returns."""
        self.wait()
        held = state(stage, optimizer)
        computed = None
        if parallel.device().type == "cuda":
            computed = torch.cuda.current_stream().record_event()
        copied = self.copied = self.thread.submit(self._copy, held, computed)
        now = replace(progress)
        self.written = self.thread.submit(
            lambda: write(self.folder, copied.result(), now, self.group)
        )

    def before_update(self) -> None:
        """To be called before weights change: the last save has its copies. Raises its errors."""
        if self.copied is not None:
            self.copied.result()
            self.copied = None
        if self.written is not None and self.written.done():
            self.wait()

    def wait(self) -> None:
        """Until the last save is on disk. Raises what went wrong with it."""
        if self.written is not None:
            written, self.written = self.written, None
            written.result()

    def _copy(self, held: dict[str, Boxes], computed: torch.Event | None) -> dict[str, Any]:
        if computed is None:
            return {name: self._on_host(name, boxes) for name, boxes in held.items()}
        stream = torch.cuda.Stream()
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            copies = {name: self._on_host(name, boxes) for name, boxes in held.items()}
        stream.synchronize()
        return copies

    def _on_host(self, name: str, boxes: Boxes) -> Boxes:
        if name not in self.host:
            pinned = parallel.device().type == "cuda"
            self.host[name] = torch.empty_like(boxes.here, device="cpu", pin_memory=pinned)
        self.host[name].copy_(boxes.here, non_blocking=True)
        return boxes.holding(self.host[name])
