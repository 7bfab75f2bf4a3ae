"""`convert` and `inspect`: the way of a conversion from one directory to another."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from ..ir.errors import InvalidInput
from ..ir.serial import load_plan
from . import formats
from .contents import Array, Contents, Target
from .dtypes import itemsize
from .engine import Limits, Ranks, execute, from_environment, place
from .engine.progress import shown
from .formats import Options
from .formats.safetensors import companions
from .layout import Layout
from .plan import pieces, prove, prove_stored
from .sides import as_expected, chosen, lay_out, read, source_of
from .verification import equal

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion did. `nbytes` of tensors in the target; `peak_bytes` of this process's
    memory, all that was resident; `verified` if both sides were read again and are equal."""

    tensors: int
    nbytes: int
    seconds: float
    peak_bytes: int
    verified: bool
    source_format: str
    target_format: str
    resumed_bytes: int = 0
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        said = asdict(self)
        said["bytes"] = said.pop("nbytes")
        said["from"], said["to"] = said.pop("source_format"), said.pop("target_format")
        return said

    def __str__(self) -> str:
        rate = (self.nbytes - self.resumed_bytes) / max(self.seconds, 1e-9) / 1e9
        lines = [
            f"{self.tensors} tensors, {self.nbytes / 1e9:.2f} GB, {self.source_format} to "
            f"{self.target_format} in {self.seconds:.1f} s ({rate:.2f} GB/s), "
            f"peak memory {self.peak_bytes / 1e6:.0f} MB"
            + (", verified: both sides are equal" if self.verified else "")
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    plan: str | os.PathLike[str] | None = None,
    mesh: Mapping[str, int] | None = None,
    source_format: str = "",
    spec: str = "",
    target_spec: str = "",
    sizes: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    tag: str = "",
    config: str | os.PathLike[str] | None = None,
    states: Sequence[str] = (),
    dtype: str = "",
    verify: bool = False,
    memory: str | int = "512M",
    threads: int = 0,
    overwrite: bool = False,
    quiet: bool = True,
) -> Converted:
    """Converts a checkpoint to another format or layout, exactly.

    `to` names a format; the target's `mesh` (`{"tp": 2, "pp": 2, "dp": 4}`) may come from a `plan`
    file. `spec` and `target_spec` are layouts of either side (a file or a built-in name; found by
    the names of the tensors otherwise), `sizes` what they need and the checkpoint does not tell,
    `flags` those of the target's format, `tag` which save of the source. `config`: a Hugging Face
    folder whose config and tokenizer are copied along. `states` and `dtype` choose what is written,
    `memory` bounds all buffers ("512M" or bytes).

    Written beside the target and renamed at the end; the same call after a kill goes on where it
    stopped. Under torchrun or srun every rank takes a share. Raises InvalidInput, CorruptCheckpoint
    (what is wrong with which file), DiskFull, VerificationFailed.
    """
    begun = time.monotonic()
    rank, world = from_environment()
    limits = Limits(_bytes(memory), threads)
    root = Path(source)
    at = place(Path(target), root, overwrite)
    made = read(root, source_format, spec, Options(tag=tag, flags=flags or {}), sizes)
    formats.check_flags(flags or {}, made.contents.format, to)
    options = _options(to, plan, mesh, flags)
    facts = {**made.contents.facts, **made.contents.mesh, **options.mesh, **(sizes or {})}
    if made.contents.format == to:
        facts = {**made.contents.facts, **options.mesh, **(sizes or {})}
    tensors = chosen(made.logical, states, dtype, to)
    wanted = lay_out(to, tensors, made.contents.job, facts, options, target_spec)
    _check_axes(options.mesh, wanted.layout)
    prove_stored(wanted.target.arrays.values(), wanted.target.records)
    moved = pieces(source_of(tensors), wanted.logical)
    prove(moved)
    final = wanted.target
    if to == "safetensors":
        final = _with_companions(final, made.contents, config)
    ranks = Ranks(at.control, rank, world)
    decisive = _decisive([to, *sorted(states), dtype], (made.layout, wanted.layout), facts, options)
    total = sum(piece.nbytes for piece in moved)

    def check(written: Path) -> None:
        back = read(
            written, to, target_spec or wanted.layout.name, Options(flags=options.flags), facts
        )
        expected = {piece.key: piece.source for piece in moved}
        own = as_expected(back.logical, expected)
        with shown("verifying", total, 0, quiet) as advance:
            threads = limits.threads_for(32 << 20)
            equal(made.contents, expected, back.contents, own, threads, advance)

    verify = verify and rank == 0
    found = execute(
        made.contents, moved, final, at, limits, decisive, ranks, quiet, check if verify else None
    )
    notes = (*made.contents.notes, *found.notes)
    return _converted(
        begun, made.contents, to, len(moved), found.nbytes, found.resumed_bytes, verify, notes
    )


def _converted(
    begun: float,
    contents: Contents,
    to: str,
    tensors: int,
    nbytes: int,
    resumed_bytes: int,
    verified: bool,
    notes: tuple[str, ...],
) -> Converted:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.monotonic() - begun
    return Converted(
        tensors, nbytes, seconds, peak, verified, contents.format, to, resumed_bytes, notes
    )


def _options(
    to: str,
    plan: str | os.PathLike[str] | None,
    mesh: Mapping[str, int] | None,
    flags: Mapping[str, Any] | None,
) -> Options:
    """What is said of the target; a plan's degrees, where they are not given by hand."""
    degrees: dict[str, int] = {}
    more: dict[str, Any] = dict(flags or {})
    if plan is not None:
        strategy = load_plan(plan).strategy
        axes = ("tp", "pp", "dp", "cp", "ep", "etp")
        degrees = {axis: getattr(strategy, axis) for axis in axes if getattr(strategy, axis) > 1}
        if strategy.vpp > 1 and to.startswith("megatron"):  # no axis of ranks: theirs only
            degrees["vpp"] = strategy.vpp
        if strategy.zero:
            more.setdefault("stage", strategy.zero)
    degrees |= mesh or {}
    if bad := [axis for axis, count in degrees.items() if type(count) is not int or count < 1]:
        raise InvalidInput(f"mesh {bad[0]}={degrees[bad[0]]}: expected a whole number from 1")
    return Options(degrees, flags=more)


_AXES = ("tp", "pp", "dp", "cp", "ep", "etp", "vpp")


def _check_axes(mesh: Mapping[str, int], layout: Layout) -> None:
    """Raises InvalidInput for an axis that no format and no rule of the layout knows."""
    known = {*_AXES, *(one.axis for rule in layout.rules for one in rule.types)}
    if unknown := sorted(mesh.keys() - known):
        raise InvalidInput(f"--mesh {unknown[0]}: expected {', '.join(sorted(known))}")


def _decisive(
    said: Sequence[str], layouts: Sequence[Layout], facts: Mapping[str, Any], options: Options
) -> str:
    """All that decides which bytes go where, beside the files of both sides: a conversion that was
    killed is gone on with under the same only."""
    specs = [layout.spec.model_dump(mode="json") for layout in layouts]
    plain = {k: v for k, v in facts.items() if isinstance(v, bool | int | float | str)}
    return json.dumps([said, specs, plain, options.mesh, options.flags], sort_keys=True)


def _with_companions(
    target: Target, contents: Contents, config: str | os.PathLike[str] | None
) -> Target:
    """Config and tokenizer of the source, or of a folder that is given."""
    folder = Path(config) if config is not None else contents.root
    if config is not None and not folder.is_dir():
        raise InvalidInput(f"--config {folder}: expected a folder with a config.json")
    if config is None and contents.format != "safetensors":
        return target
    given = [one for one in companions(folder, config is not None) if one.file not in target.files]
    files = {**target.files, **{one.file: len(one.data) for one in given}}
    return replace(target, files=files, literals=[*target.literals, *given])


def _bytes(said: str | int) -> int:
    if isinstance(said, int):
        return said
    match = _SIZE.fullmatch(said.strip())
    if match is None:
        raise InvalidInput(f"--memory {said!r}: expected bytes, as 512M or 2G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a directory is. `problem` says in what it is not whole ("" if it is, as far as its
    headers tell)."""

    path: str
    format: str
    layout: str
    mesh: Mapping[str, int]
    step: int | None
    files: int
    file_bytes: int
    tensors: int
    parameters: int
    states: Mapping[str, Mapping[str, Any]]
    checksums: str
    problem: str
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        return {**asdict(self), "whole": not self.problem}

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis}={count}" for axis, count in self.mesh.items() if count > 1)
        lines = [
            f"{self.path}: {self.format}" + (f", {mesh}" if mesh else ""),
            f"  layout      {self.layout}",
            f"  step        {self.step if self.step is not None else 'none (weights only)'}",
            f"  files       {self.files}, {self.file_bytes / 1e9:.3f} GB",
            f"  tensors     {self.tensors}, {self.parameters:,} parameters",
            *(
                f"  {state:<11} {said['tensors']} tensors, {', '.join(said['dtypes'])}, "
                f"{said['bytes'] / 1e9:.3f} GB"
                for state, said in self.states.items()
            ),
            f"  checksums   {self.checksums}",
            "  whole       " + (f"NO: {self.problem}" if self.problem else "yes, by its headers"),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def inspect(
    path: str | os.PathLike[str],
    *,
    source_format: str = "",
    spec: str = "",
    sizes: Mapping[str, Any] | None = None,
    tag: str = "",
) -> Inspected:
    """Says what a directory is, its layout and sizes, and whether all of it is there.

    Headers only are read. Raises InvalidInput for what is no checkpoint, CorruptCheckpoint for one
    whose headers are damaged.
    """
    root = Path(path)
    name = source_format or formats.detect(root)
    contents = formats.load(name).read(root, Options(tag=tag))
    problem, layout, logical = "", "unknown", dict(contents.arrays)
    try:
        made = read(root, name, spec, Options(tag=tag), sizes)
        layout, logical = made.layout.name, dict(made.logical)
        prove(pieces(logical, logical.values()))
    except InvalidInput as error:
        layout = f"not clear: {error}"
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        problem = str(error)
    return _inspected(root, contents, layout, logical, problem)


def _inspected(
    root: Path, contents: Contents, layout: str, logical: Mapping[Any, Array], problem: str
) -> Inspected:
    states: dict[str, dict[str, Any]] = {}
    names: dict[str, int] = {}
    for (state, tensor), array in logical.items():
        said = states.setdefault(state, {"tensors": 0, "bytes": 0, "dtypes": []})
        said["tensors"] += 1
        said["bytes"] += prod(array.shape) * itemsize(array.dtype)
        if array.dtype not in said["dtypes"]:
            said["dtypes"].append(array.dtype)
        if state in ("weight", "master"):
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
        len({tensor for _, tensor in logical}),
        sum(names.values()),
        states,
        checksums,
        problem,
        contents.notes,
    )
