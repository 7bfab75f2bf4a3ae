"""torch.distributed.checkpoint (DCP): directories of FSDP1 and FSDP2, of any DTensor mesh, and of
the programs that we emit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....ir import CorruptCheckpoint
from ...boxes import Boxes
from ...contents import WEIGHT, Array, Contents, Job, Key, Target, Wanted, with_unread
from ...paths import sizes
from ...pickles import decode, encode, scalar
from .. import Options
from .items import Files
from .metadata import FILE, Metadata, check_names, load
from .names import Meaning, is_nested, meaning
from .writing import target as _target

__all__ = ["found", "read", "target"]


def found(root: Path) -> str | None:
    """A directory with DCP's index."""
    return f"holds {FILE} of torch.distributed.checkpoint" if (root / FILE).is_file() else None


def read(root: Path, options: Options) -> Contents:
    """What a DCP directory holds; raises CorruptCheckpoint where index and data differ."""
    metadata = load(root)
    if (root / "common.pt").is_file() or "common_state/shard_0_1" in metadata.objects:
        raise CorruptCheckpoint(
            f"{root / 'metadata.json'}: missing; Megatron writes it last, so this save was cut "
            "off, or a copy is incomplete. Restore it, or load an earlier checkpoint"
        )
    check_names(metadata, root)
    with Files(root) as files:
        files.check(metadata.items)
        arrays, job = _sorted_out(metadata, files)
        records = with_unread(files.records, files.unread)
    for alias, name in job.others.get("shared_params", {}).items():
        if (WEIGHT, name) in arrays:  # one tensor under two names
            arrays.pop((WEIGHT, alias), None)
    return Contents("dcp", root, sizes(root), records, arrays, job, notes=_notes(root, metadata))


def target(wanted: Sequence[Wanted], job: Job, options: Options) -> Target:
    """A DCP directory: each rank of `options.mesh` writes its boxes into a file of its own.

    The flag `names` is `state_dict` (`model.NAME`, `optim.state.NAME.exp_avg`, as with
    `get_state_dict`; the default) or `emitted` (of our programs).
    """
    return _target(wanted, job, options)


def _sorted_out(metadata: Metadata, files: Files) -> tuple[dict[Key, Array], Job]:
    paths = metadata.paths
    nested = is_nested(list(paths.values()))
    arrays: dict[Key, Array] = {}
    steps: dict[str, float] = {}
    groups: dict[str, dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for fqn, tensor in metadata.tensors.items():
        floating = tensor.dtype[0] in "FB" and tensor.dtype != "BOOL"
        said = meaning(fqn, paths.get(fqn, ()), floating, nested)
        if said.kind != "array":
            value = files.small(fqn, tensor)
            if value is not None:
                _note(said, scalar(value) if said.kind == "step" else value, steps, groups, others)
                continue
            said = Meaning("array", "buffer", fqn)
        boxes = files.boxes(fqn, tensor)
        array = Array(said.state, said.name, tensor.shape, tensor.dtype, _giving(boxes))
        if array.key in arrays:
            raise CorruptCheckpoint(f"{files.root / FILE}: {said.state} of {said.name} twice")
        arrays[array.key] = array
    for fqn, item in metadata.objects.items():
        said = meaning(fqn, paths.get(fqn, ()), None, nested)
        _note(said, files.object(item), steps, groups, others)
    return arrays, _job(steps, groups, others)


def _giving(boxes: Boxes) -> Any:
    return lambda: boxes


def _note(
    said: Meaning,
    value: Any,
    steps: dict[str, float],
    groups: dict[str, dict[str, Any]],
    others: dict[str, Any],
) -> None:
    """Puts a value that is no array where it belongs."""
    if said.kind == "step":
        number = scalar(value)
        if number is not None:
            steps[said.name] = float(number)
    elif said.kind == "group":
        groups.setdefault(said.name, {})[said.key] = encode(value)
    else:
        at = others
        for part in said.path[:-1]:
            inner = at.setdefault(str(part), {})
            if not isinstance(inner, dict):
                inner = at[str(part)] = {"": inner}
            at = inner
        at[str(said.path[-1])] = encode(value)


def _job(
    steps: Mapping[str, float], groups: Mapping[str, dict[str, Any]], others: dict[str, Any]
) -> Job:
    made: list[dict[str, Any]] = []
    if all(name.isdigit() for name in groups):
        made = [groups[name] for name in sorted(groups, key=int)]
    else:  # flattened: a group per parameter; equal ones are one
        for name, entries in groups.items():
            entries = {k: v for k, v in entries.items() if k != "params"}
            for group in made:
                if {k: v for k, v in group.items() if k != "params"} == entries:
                    group["params"].append(name)
                    break
            else:
                made.append({**entries, "params": [name]})
    numbers = set(steps.values())
    if len(numbers) > 1:
        others = {**others, "steps": {name: int(step) for name, step in steps.items()}}
    step = int(max(numbers)) if numbers else _progress(others)
    return Job(step, tuple(made), others=others)


def _progress(others: Mapping[str, Any]) -> int | None:
    """The step of a training loop that counts for itself (our programs do)."""
    train = others.get("train")
    value = train.get("step") if isinstance(train, dict) else None
    if isinstance(value, dict):
        number = scalar(decode(value))
        return int(number) if number is not None else None
    return None


def _notes(root: Path, metadata: Metadata) -> tuple[str, ...]:
    """Signs of a save that was cut off, which are no proof: copies lose the times of files."""
    index = (root / FILE).stat().st_mtime
    named = sorted({item.file for item in metadata.items})
    newer = [name for name in named if (root / name).stat().st_mtime > index + 1]
    if not newer:
        return ()
    return (
        f"{newer[0]} was written after {FILE}: if a save into this directory was cut off, the data "
        "are of another step than the index says",
    )
