"""Checkpoints through torch.distributed.checkpoint (DCP), independent of the layout.

A checkpoint holds every weight at its full shape under its original name, AdamW's state under
`optimizer.exp_avg.NAME` and `optimizer.exp_avg_sq.NAME`, and the progress of the run under
`train.*`. Each rank writes the boxes of the full tensors that it has and reads the boxes that it
wants, so any layout resumes from any other, and plain `dcp.load` into full tensors works too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import reads
import settings
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel import Rectangle, rectangles, shard
from parameters import PARAMETERS
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

KEPT = 2  # whole checkpoints that stay in a folder


@dataclass
class Progress:
    """How far a run has come: steps done, samples trained on, and its seed."""

    step: int = 0
    samples: int = 0
    seed: int = 0


class Boxes(Tensor):
    """A full tensor of which this rank holds some boxes, as DCP's planner sees it.

    DCP asks a tensor for its boxes through the three methods below (as it asks DTensor, which can
    hold only one).
    """

    of: str
    here: Tensor
    boxes: dict[torch.Size, Rectangle]

    @staticmethod
    def __new__(cls, name: str, here: Tensor, boxes: list[Rectangle] | None = None) -> Boxes:
        return torch.Tensor._make_wrapper_subclass(
            cls, PARAMETERS[name].shape, dtype=here.dtype, device=here.device
        )

    def __init__(self, name: str, here: Tensor, boxes: list[Rectangle] | None = None) -> None:
        self.of, self.here = name, here
        held = rectangles(name) if boxes is None else boxes
        self.boxes = {torch.Size(box.full): box for box in held}

    def holding(self, here: Tensor) -> Boxes:
        """The same boxes, in another piece of memory."""
        return Boxes(self.of, here, list(self.boxes.values()))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func}: a checkpoint's view of a tensor only names its boxes")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Boxes({tuple(self.shape)}, {list(self.boxes.values())})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=offset, sizes=torch.Size(box.sizes))
            for offset, box in self.boxes.items()
        ]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.here[self.boxes[index.offset].in_local()]


def state(stage: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """What DCP saves and loads in place: weights and, if given, the optimizer's state."""
    found: dict[str, Any] = {}
    for name, parameter in stage.named_parameters():
        found[name] = Boxes(name, shard(parameter))
        if optimizer is not None and parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                moment = shard(optimizer.state[parameter][key])
                found[f"optimizer.{key}.{name}"] = Boxes(name, moment)
    return found


def save(
    folder: str | Path, stage: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Writes `FOLDER/step-N` and returns it. `saving.py` does so beside training."""
    return write(folder, state(stage, optimizer), progress)


def write(
    folder: str | Path,
    held: Mapping[str, Any],
    progress: Progress,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes what all ranks hold as `FOLDER/step-N`; it appears under that name only when it is
    whole. `group`: of all ranks, the default one if not given."""
    final = Path(folder) / f"step-{progress.step:08d}"
    partial = final.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group)
    numbers = {f"train.{k}": torch.tensor(v) for k, v in vars(progress).items()}
    # returns when all ranks have written, and the index too
    dcp.save({**held, **numbers}, checkpoint_id=partial, process_group=group)
    if dist.get_rank() == 0:
        old = final.with_suffix(".old")
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        for earlier in _whole(final.parent)[:-KEPT]:
            shutil.rmtree(earlier)
    dist.barrier(group)
    return final


def _flush(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _whole(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to the end, oldest first."""
    return sorted(
        path
        for path in folder.glob("step-*")
        if re.fullmatch(r"step-\d+", path.name) and (path / ".metadata").exists()
    )


def newest(folder: str | Path) -> Path:
    """The checkpoint to resume from: the folder itself, or the newest whole one in it."""
    folder = Path(folder)
    if (folder / ".metadata").exists():
        return folder
    found = _whole(folder)
    if not found:
        raise SystemExit(f"no checkpoint in {folder}: expected {folder}/step-N/.metadata")
    return found[-1]


def resume(
    folder: str | Path, stage: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Loads weights, progress and, if given, the optimizer's state, whatever layout saved them.

    The folder holds checkpoints of such programs, or a list of reads from one of any format.
    """
    if optimizer is not None:
        create_state(optimizer)
    if (Path(folder) / reads.FILE).exists():
        progress = _follow(Path(folder), stage, optimizer)
    else:
        loaded = state(stage, optimizer)
        numbers = {field.name: torch.tensor(0) for field in fields(Progress)}
        loaded |= {f"train.{name}": number for name, number in numbers.items()}
        dcp.load(loaded, checkpoint_id=newest(folder))
        progress = Progress(**{name: int(number) for name, number in numbers.items()})
    if optimizer is not None:
        for entry in optimizer.state.values():
            entry["step"].fill_(progress.step)
    return progress


@torch.no_grad()
def _follow(folder: Path, stage: nn.Module, optimizer: torch.optim.Optimizer | None) -> Progress:
    """Fills this rank's shards as a list of reads says; moments that it has not stay 0."""
    parameters = dict(stage.named_parameters())
    source = reads.Reads(folder, parameters)
    for name, parameter in parameters.items():
        tensors = {"weight": shard(parameter)}
        if optimizer is not None and parameter in optimizer.state:
            moments = source.states(name) & {"exp_avg", "exp_avg_sq"}
            tensors |= {key: shard(optimizer.state[parameter][key]) for key in moments}
        for key, here in tensors.items():
            for box in rectangles(name):
                found, dtype = source.read(name, key, box.full, box.sizes)
                values = torch.from_numpy(found).view(_DTYPES[dtype])
                here[box.in_local()].copy_(values)
    step = int(source.head["step"] or 0)
    known = {key.removeprefix("train."): int(n) for key, n in source.head["train"].items()}
    return Progress(**{"step": step, "samples": step * settings.GLOBAL_BATCH, **known})


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes AdamW's state, which otherwise appears with the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
