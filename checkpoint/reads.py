"""Read lists: how a program loads any checkpoint straight into its own layout.

A list names, for every parameter of a plan, the boxes of its states and the bytes where they lie.
It knows nothing of ranks: each rank of an emitted program intersects the boxes with what it holds
itself (`reads.py` among the emitted files) and reads only that, so that one list serves every
layout of the model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir import InvalidInput
from ..ir.plan import Plan
from ..ir.serial import load_plan, write_whole
from .arguments import check_sizes
from .boxes import Boxes, coverage, without_repeats
from .contents import EXP_AVG, EXP_AVG_SQ, MASTER, WEIGHT, Array, Contents, Key
from .dtypes import itemsize
from .formats import Options, detect
from .formats.flags import checked
from .sides import read
from .verification import copies_agree

FILE = "reads.jsonl"


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of reads: the parameters of the plan, and the bytes that all ranks together need."""

    path: Path
    parameters: int
    nbytes: int
    step: int | None
    seconds: float
    source_format: str

    def to_json(self) -> dict[str, Any]:
        """For scripts; the names are those of a conversion, where they mean the same."""
        return {
            "path": str(self.path),
            "tensors": self.parameters,
            "bytes": self.nbytes,
            "step": self.step,
            "seconds": self.seconds,
            "from": self.source_format,
            "to": "reads",
            "verified": False,
        }

    def __str__(self) -> str:
        at = f" of step {self.step}" if self.step is not None else ""
        return (
            f"{self.path}: where {self.parameters} parameters{at} lie in the {self.source_format} "
            f"checkpoint, {self.nbytes / 1e9:.2f} GB; train.py --resume {self.path.parent} goes on"
        )


def list_reads(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str],
    *,
    spec: str = "",
    sizes: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    tag: str = "",
    format_name: str = "",
) -> Listed:
    """Writes into a folder how the programs of a plan load a checkpoint from where it is.

    `spec`, `sizes` and `flags` describe the source as for `convert`. Raises InvalidInput where the
    checkpoint does not have what the plan's model needs, CorruptCheckpoint where it is damaged.
    """
    begun = time.monotonic()
    planned = plan if isinstance(plan, Plan) else load_plan(plan)
    name = format_name or detect(Path(source))
    options = Options(tag=tag, flags=checked(flags or {}, name, tag=tag))
    made = read(Path(source), name, spec, options, sizes)
    check_sizes(sizes or {}, made.contents, [made.layout])
    nbytes = write_reads(planned, made.contents, made.logical, Path(folder))
    parameters, step = len(planned.parameter_stages()), made.contents.job.step
    seconds = time.monotonic() - begun
    return Listed(Path(folder) / FILE, parameters, nbytes, step, seconds, made.contents.format)


def write_reads(plan: Plan, contents: Contents, logical: Mapping[Key, Array], folder: Path) -> int:
    """Writes `FOLDER/reads.jsonl` for a plan's programs and returns the bytes that it speaks of.

    `logical` are the checkpoint's tensors under the names of the plan's model. Of a tensor that
    lies in several files the list names one copy; where copies have to be equal (`Array.combine`),
    they are read and compared before. Raises InvalidInput where a parameter is missing, has another
    shape, or does not lie anywhere as it is, CorruptCheckpoint where copies differ.
    """
    files = {name: number for number, name in enumerate(contents.files)}
    head = {
        "format": "shardwright reads",
        "version": 1,
        "root": str(contents.root.resolve()),
        "files": list(files),
        "step": contents.job.step,
        "train": {k: v for k, v in contents.job.others.items() if k.startswith("train.")},
    }
    lines, total = [json.dumps(head)], 0
    wanted = list(_wanted(plan, logical))
    copies_agree(contents, (array for _, _, array in wanted))
    for name, state, array in wanted:
        boxes = without_repeats(array.where().clipped(array.shape))
        covered = coverage(boxes, array.shape)
        if not covered.exactly_once:
            what = "overlap" if covered.twice else f"hold {covered.covered} of {covered.elements}"
            raise InvalidInput(f"{state} of {name}: its boxes {what} elements; convert it first")
        total += covered.elements * itemsize(array.dtype)
        lines.append(json.dumps(_line(name, state, array, boxes, contents, files)))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, "\n".join(lines) + "\n", "read list")
    return total


def _wanted(plan: Plan, logical: Mapping[Key, Array]) -> Iterator[tuple[str, str, Array]]:
    """(parameter, state of the program, array): the program's weight is the master copy."""
    stages = plan.parameter_stages()
    moments = [state for state in (EXP_AVG, EXP_AVG_SQ) if any(key[0] == state for key in logical)]
    for name, parameter in plan.model.parameters.items():
        if name not in stages:
            continue
        weight = logical.get((MASTER, name)) or logical.get((WEIGHT, name))
        found = {WEIGHT: weight}
        if parameter.trainable:
            found |= {state: logical.get((state, name)) for state in moments}
        for state, array in found.items():
            if array is None:
                some = ", ".join(sorted(n for s, n in logical if s == WEIGHT)[:3])
                raise InvalidInput(
                    f"the checkpoint has no {state} of {name} (it has {some}, …): a layout that "
                    "gives its tensors the model's names is needed, see --spec"
                )
            if array.shape != tuple(parameter.shape):
                raise InvalidInput(
                    f"{state} of {name} has shape {array.shape} in the checkpoint, "
                    f"{tuple(parameter.shape)} in the plan"
                )
            if array.combine not in ("copy", "equal"):
                raise InvalidInput(
                    f"{state} of {name} is the {array.combine} of several arrays: no bytes to be "
                    "read as they are; convert it to a format first, see --to"
                )
            yield name, state, array


def _line(
    name: str,
    state: str,
    array: Array,
    boxes: Boxes,
    contents: Contents,
    files: Mapping[str, int],
) -> dict[str, Any]:
    item, rows = itemsize(array.dtype), []
    for begin, size, stride, number, offset in zip(
        boxes.begin.tolist(),
        boxes.size.tolist(),
        boxes.stride.tolist(),
        boxes.record.tolist(),
        boxes.offset.tolist(),
        strict=True,
    ):
        record = contents.records[number]
        digest = None
        if record.digest is not None and _is_all(size, stride, offset, record.nbytes // item):
            digest = [record.digest.kind, record.digest.value]
        rows.append(
            [files[record.file], record.offset + offset * item, begin, size, stride, digest]
        )
    shape = list(array.shape)
    return {"name": name, "state": state, "dtype": array.dtype, "shape": shape, "boxes": rows}


def _is_all(size: list[int], stride: list[int], offset: int, elements: int) -> bool:
    """Whether a box is all of its record, in order."""
    inside = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n > 1 and step != inside:
            return False
        inside *= n
    return offset == 0 and inside == elements
