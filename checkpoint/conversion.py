"""`convert`: the way of a conversion from one directory to another."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..ir.errors import InvalidInput
from ..ir.serial import load_plan
from . import formats
from .arguments import check_axes, check_sizes, memory_bytes
from .contents import Contents, Given, Target
from .engine import Limits, Ranks, execute, from_environment, place
from .engine.progress import shown
from .formats import Options
from .formats.companions import carried
from .formats.flags import WHOLE, checked
from .layout import Layout
from .plan import pieces, prove, prove_stored
from .sides import as_expected, chosen, lay_out, opened, read, source_of, understood
from .verification import equal


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
    folder that tells sizes, and whose config and tokenizer are copied along, instead of those
    beside the source. `states` and `dtype` choose what is written, `memory` bounds all buffers
    ("512M" or bytes). What is given and nothing would look at is refused.

    Written beside the target and renamed at the end; the same call after a kill goes on where it
    stopped. Under torchrun or srun every rank takes a share. Raises InvalidInput, CorruptCheckpoint
    (what is wrong with which file), DiskFull, VerificationFailed.
    """
    begun = time.monotonic()
    rank, world = from_environment()
    limits = Limits(memory_bytes(memory), threads)
    limits.check()
    root = Path(source)
    formats.load(to)
    source_format = source_format or formats.detect(root)
    said = checked(flags or {}, source_format, to, tag)
    at = place(Path(target), root, overwrite)
    home = Path(config) if config is not None else None
    stored = opened(root, source_format, Options(tag=tag, flags=said), home)
    made = understood(stored, spec, sizes)
    beside = carried(made.contents, root, home)
    options = replace(_options(to, plan, mesh, said), companions=beside)
    facts = {**made.contents.facts, **made.contents.mesh, **options.mesh, **(sizes or {})}
    if made.contents.format == to:
        facts = {**made.contents.facts, **options.mesh, **(sizes or {})}
    tensors = chosen(made.logical, states, dtype, to)
    wanted = lay_out(to, tensors, made.contents.job, facts, options, target_spec)
    unused = check_sizes(sizes or {}, made.contents, (made.layout, wanted.layout), to)
    check_axes(options.mesh, wanted.layout, to, mesh or {})
    prove_stored(wanted.target.arrays.values(), wanted.target.records)
    moved = pieces(source_of(wanted.tensors), wanted.logical)
    prove(moved)
    final = _with_companions(wanted.target, beside)
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
    notes = (*made.contents.notes, *unused, *found.notes)
    if plan is not None and to in WHOLE and not target_spec:
        notes = (*notes, f"the plan changes nothing here: {to} holds whole tensors")
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


def _with_companions(target: Target, beside: Sequence[Given]) -> Target:
    """A target with the files of a Hugging Face folder, unless it has some of that name itself."""
    given = [one for one in beside if one.file not in target.files]
    files = {**target.files, **{one.file: len(one.data) for one in given}}
    return replace(target, files=files, literals=[*target.literals, *given])


def _decisive(
    said: Sequence[str], layouts: Sequence[Layout], facts: Mapping[str, Any], options: Options
) -> str:
    """All that decides which bytes go where, beside the files of both sides: a conversion that was
    killed is gone on with under the same only."""
    specs = [layout.spec.model_dump(mode="json") for layout in layouts]
    plain = {k: v for k, v in facts.items() if isinstance(v, bool | int | float | str)}
    return json.dumps([said, specs, plain, options.mesh, options.flags], sort_keys=True)
