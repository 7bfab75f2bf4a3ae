"""`inspect`: what a directory is, by its headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..ir.errors import CorruptCheckpoint, InvalidInput
from . import formats
from .arguments import check_sizes
from .contents import MASTER, WEIGHT, Array, Contents, Key
from .dtypes import itemsize
from .formats import Options
from .formats.flags import checked
from .plan import pieces, prove
from .sides import opened, understood


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a directory is. `problem` says in what it is not whole ("" if it is, as far as its
    headers tell). Where no layout describes it, `parameters` is None, and sizes are those of the
    shards as they are stored, copies on several ranks included."""

    path: str
    format: str
    layout: str
    mesh: Mapping[str, int]
    step: int | None
    files: int
    file_bytes: int
    tensors: int
    parameters: int | None
    states: Mapping[str, Mapping[str, Any]]
    checksums: str
    problem: str
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        known = self.problem or self.parameters is not None
        return {**asdict(self), "whole": not self.problem if known else None}

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={count}" for axis, count in self.mesh.items() if count > 1)
        lines = [
            f"{self.path}: {self.format}" + (f", {mesh}" if mesh else ""),
            f"  layout      {self.layout}",
            f"  step        {self.step if self.step is not None else 'none (weights only)'}",
            f"  files       {self.files}, {self.file_bytes / 1e9:.3f} GB",
            f"  tensors     {self.tensors}, "
            + (
                f"{self.parameters:,} parameters"
                if self.parameters is not None
                else "as stored by all ranks; how many parameters they make is not clear"
            ),
            *(
                f"  {state:<11} {said['tensors']} tensors, {', '.join(said['dtypes'])}, "
                f"{said['bytes'] / 1e9:.3f} GB"
                for state, said in self.states.items()
            ),
            f"  checksums   {self.checksums}",
            f"  whole       {self._whole()}",
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _whole(self) -> str:
        if self.problem:
            return f"NO: {self.problem}"
        if self.parameters is None:
            return "all files that are named are there; no layout says whether tensors are whole"
        return "yes, by its headers"


def inspect(
    path: str | os.PathLike[str],
    *,
    source_format: str = "",
    spec: str = "",
    sizes: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    tag: str = "",
) -> Inspected:
    """Says what a directory is, its layout and sizes, and whether all of it is there.

    Headers only are read. Raises InvalidInput for what is no checkpoint, and for a layout that is
    given and does not describe it; CorruptCheckpoint for one whose headers are damaged.
    """
    root = Path(path)
    name = source_format or formats.detect(root)
    contents = opened(root, name, Options(tag=tag, flags=checked(flags or {}, name, tag=tag)))
    problem, layout = "", "unknown"
    logical: Mapping[Key, Array] | None = None
    try:
        made = understood(contents, spec, sizes)
        contents, layout, logical = made.contents, made.layout.name, made.logical
        unused = check_sizes(sizes or {}, contents, [made.layout])
        contents = replace(contents, notes=(*contents.notes, *unused))
        prove(pieces(logical, logical.values()))
    except InvalidInput as error:
        if spec or sizes:
            raise
        layout = f"not clear: {error}"
    except CorruptCheckpoint as error:
        problem = f"{root}: {error}"
    return _inspected(root, contents, layout, logical, problem)


def _inspected(
    root: Path,
    contents: Contents,
    layout: str,
    logical: Mapping[Key, Array] | None,
    problem: str,
) -> Inspected:
    states: dict[str, dict[str, Any]] = {}
    names: dict[str, int] = {}
    arrays = contents.arrays if logical is None else logical
    for (state, tensor), array in arrays.items():
        said = states.setdefault(state, {"tensors": 0, "bytes": 0, "dtypes": []})
        said["tensors"] += 1
        said["bytes"] += prod(array.shape) * itemsize(array.dtype)
        if array.dtype not in said["dtypes"]:
            said["dtypes"].append(array.dtype)
        if state in (WEIGHT, MASTER):
            names[tensor] = prod(array.shape)
    promised = [record.digest is not None for record in contents.records]
    checksums = "none" if not any(promised) else "all" if all(promised) else "some"
    kinds = sorted({r.digest.kind for r in contents.records if r.digest is not None})
    if kinds:
        checksums += f" ({', '.join(kinds)})"
    return Inspected(
        str(root),
        contents.format,
        layout,
        dict(contents.mesh),
        contents.job.step,
        len(contents.files),
        sum(contents.files.values()),
        len({tensor for _, tensor in arrays}),
        None if logical is None else sum(names.values()),
        states,
        checksums,
        problem,
        contents.notes,
    )
